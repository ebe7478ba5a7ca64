"""Saving and loading: tables survive every route diffusers has for a scheduler, and configs go there and back."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatchEuler
from diffusers.modular_pipelines import ComponentSpec
from diffusers.utils.import_utils import is_torchsde_available
from tiny_pipelines import build

import diffusers_searched_solver
from diffusers_searched_solver import (
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    SolverFileError,
    list_bundled_solvers,
    time_grid,
)


TABLES = ("timesteps", "alphas", "sigmas", "coefficients")
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}
FLOW = {"prediction_type": "flow_prediction", "shift": 3.0}


def searched(**config):
    """A scheduler with tables of 3 and 5 steps that no formula gives."""
    scheduler = SearchedSolverScheduler(**config)
    random = np.random.default_rng(0)
    solvers = {}
    for n in (3, 5):
        timesteps, alphas, sigmas = time_grid(scheduler.process, n)
        coefficients = np.tril(random.normal(size=(n, n)))
        coefficients[:, 0] += 1 - coefficients.sum(1)
        solvers[n] = SearchedSolver(timesteps - random.uniform(0, 1, n), alphas, sigmas, coefficients, "velocity")
    file = SolverFile(solvers, scheduler.process, scheduler.config.prediction_type, {"base_model": "me/mine"})
    return SearchedSolverScheduler.from_config(scheduler.config, solver=file)


def assert_same(one, other):
    assert type(one) is type(other)
    assert one.solver_file.step_counts == other.solver_file.step_counts
    assert one.solver_file.provenance == other.solver_file.provenance
    assert one.process == other.process == other.solver_file.process
    for n, solver in one.solver_file.solvers.items():
        for name in TABLES:
            assert np.array_equal(getattr(solver, name), getattr(other.solver_file.solvers[n], name))


def run(scheduler, steps=5, start=0, sample=None):
    """Steps of a run with a network that depends on time and state."""
    if start == 0:
        scheduler.set_timesteps(5)
        sample = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
    for t in scheduler.timesteps[start:steps]:
        sample = scheduler.step(torch.tanh(sample + t / 1000), t, sample).prev_sample
    return sample


@pytest.fixture(params=[VP, FLOW], ids=["variance preserving", "flow matching"])
def scheduler(request):
    return searched(**request.param)


# Alone


@pytest.mark.parametrize("method", ["save_pretrained", "save_config"])
def test_a_round_trip_on_disk_keeps_every_bit(tmp_path, scheduler, method, caplog):
    getattr(scheduler, method)(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"scheduler_config.json", "solver/searched_solver.safetensors"}
    loaded = SearchedSolverScheduler.from_pretrained(tmp_path)
    assert_same(scheduler, loaded)
    assert run(loaded).equal(run(scheduler))
    assert not caplog.records


def test_a_second_round_trip_changes_nothing(tmp_path, scheduler):
    scheduler.save_pretrained(tmp_path / "one")
    SearchedSolverScheduler.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("scheduler_config.json", "solver/searched_solver.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_subfolder_has_its_own_solver(tmp_path, scheduler):
    scheduler.save_pretrained(tmp_path / "scheduler")
    SearchedSolverScheduler().save_pretrained(tmp_path)
    assert_same(scheduler, SearchedSolverScheduler.from_pretrained(tmp_path, subfolder="scheduler"))


@pytest.mark.parametrize("name", list_bundled_solvers())
def test_a_bundled_solver_loads_by_name_without_a_warning(name, caplog):
    assert SearchedSolverScheduler.from_pretrained(name).solver_file.step_counts
    assert not caplog.records


def test_a_folder_without_a_solver_file_warns_and_is_classical(tmp_path, caplog):
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path)
    loaded = SearchedSolverScheduler.from_pretrained(tmp_path)
    assert loaded.solver_file is None and loaded.config.prediction_type == "v_prediction"
    assert f"'{tmp_path}' has no 'solver/searched_solver.safetensors'" in caplog.text
    assert "classical multistep" in caplog.text and "search/run.py" in caplog.text


def test_saving_a_classical_scheduler_over_a_searched_one_leaves_no_solver(tmp_path, scheduler):
    scheduler.save_pretrained(tmp_path)
    SearchedSolverScheduler().save_pretrained(tmp_path)
    assert SearchedSolverScheduler.from_pretrained(tmp_path).solver_file is None


def test_a_broken_solver_file_is_refused_and_not_replaced_by_a_classical_solver(tmp_path, scheduler):
    scheduler.save_pretrained(tmp_path)
    path = tmp_path / "solver/searched_solver.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SolverFileError, match="not a whole safetensors file.*Download or save it again"):
        SearchedSolverScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["sit-xl-2", "./no/such/folder", "/no/such/folder", "runs/a/b"])
def test_an_unknown_name_is_answered_with_what_there_is(name):
    with pytest.raises(OSError, match=f"Cannot load a scheduler from '{name}'.*(?s:.)*bundled solver.*sit-xl-2-256"):
        SearchedSolverScheduler.from_pretrained(name, local_files_only=True)


def test_a_misspelt_bundled_solver_is_answered_with_its_name_before_the_hub_is_asked(monkeypatch):
    monkeypatch.setattr(SearchedSolverScheduler, "load_config", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(OSError, match="Cannot load a scheduler from 'dit-xl-2-265'.*Did you mean 'dit-xl-2-256'?"):
        SearchedSolverScheduler.from_pretrained("dit-xl-2-265")


@pytest.mark.parametrize("subfolder", [None, "mistyped"])
def test_a_folder_without_a_config_is_named_though_the_one_above_has_one(tmp_path, scheduler, subfolder):
    scheduler.save_pretrained(tmp_path)
    folder = tmp_path / "empty"
    folder.mkdir()
    source, expected = (folder, folder) if subfolder is None else (tmp_path, tmp_path / subfolder)
    with pytest.raises(OSError, match=f"'{expected}' has no file named scheduler_config.json"):
        SearchedSolverScheduler.from_pretrained(source, subfolder=subfolder)


def test_an_unknown_solver_is_answered_with_what_there_is():
    with pytest.raises(FileNotFoundError, match="No solver file at 'sit'.*sit-xl-2-256"):
        SearchedSolverScheduler.from_config(FLOW, solver="sit")


def test_tables_that_do_not_fit_the_model_are_refused_with_what_differs():
    file = searched(beta_schedule="scaled_linear").solver_file
    message = "cannot be carried over.*5 steps.*4 of its 5 nodes.*trained_betas None there, .0.1, 0.3. here"
    with pytest.raises(ValueError, match=message):
        SearchedSolverScheduler.from_config(
            {"trained_betas": [0.1, 0.3]}, solver=dataclasses.replace(file, solvers={5: file.solvers[5]})
        )


def test_unused_keywords_come_back(tmp_path, scheduler):
    scheduler.save_pretrained(tmp_path)
    loaded, unused = SearchedSolverScheduler.from_pretrained(tmp_path, return_unused_kwargs=True, mistyped=1)
    assert_same(scheduler, loaded)
    assert unused["mistyped"] == 1


# Copies


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_during_a_run_finishes_it_alone(scheduler, duplicate):
    expected = run(scheduler)
    half = run(scheduler, steps=3)
    twin = duplicate(scheduler)
    assert_same(scheduler, twin)
    assert run(twin, start=3, sample=half).equal(expected)
    assert run(scheduler, start=3, sample=half).equal(expected)


# Pipelines


@pytest.fixture(scope="module")
def dit():
    return build("dit").pipe


LOAD_AND_SHOW = """
import json, sys
import diffusers_searched_solver
from diffusers import DiffusionPipeline
scheduler = DiffusionPipeline.from_pretrained(sys.argv[1]).scheduler
tables = {n: solver.coefficients.tolist() for n, solver in scheduler.solver_file.solvers.items()}
print(json.dumps([type(scheduler).__module__, type(scheduler).__name__, tables]))
"""


def test_a_pipeline_saved_with_our_scheduler_loads_in_a_new_process(tmp_path, dit):
    dit.scheduler = searched()
    dit.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_searched_solver", "SearchedSolverScheduler"]
    command = [sys.executable, "-c", LOAD_AND_SHOW, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tables = {str(n): solver.coefficients.tolist() for n, solver in dit.scheduler.solver_file.solvers.items()}
    assert json.loads(output.splitlines()[-1]) == ["diffusers_searched_solver", "SearchedSolverScheduler", tables]


def test_a_saved_pipeline_makes_the_same_images(tmp_path, dit):
    dit.scheduler = searched()
    dit.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert_same(dit.scheduler, loaded.scheduler)
    images = [
        pipe([1], num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in (dit, loaded)
    ]
    assert np.array_equal(*images)


def test_our_scheduler_takes_the_place_of_the_one_a_pipeline_was_saved_with(tmp_path, dit):
    dit.scheduler = DDIMScheduler()
    dit.save_pretrained(tmp_path)
    ours = searched()
    assert DiffusionPipeline.from_pretrained(tmp_path, scheduler=ours).scheduler is ours


def test_the_package_shows_diffusers_what_it_looks_for():
    """diffusers resolves a scheduler's library by these names when it loads a pipeline."""
    assert SearchedSolverScheduler.__module__ == "diffusers_searched_solver"
    assert diffusers_searched_solver.SchedulerMixin is diffusers.SchedulerMixin
    assert diffusers_searched_solver.scheduler.SchedulerMixin is diffusers.SchedulerMixin


# Modular pipelines


@pytest.mark.parametrize("source", ["folder", "bundled"])
def test_a_modular_component_keeps_its_tables(tmp_path, scheduler, source):
    if source == "folder":
        scheduler.save_pretrained(tmp_path / "sub")
        loaded = SearchedSolverScheduler.from_pretrained(tmp_path, subfolder="sub")
    else:
        loaded = SearchedSolverScheduler.from_pretrained("sit-xl-2-256")
    spec = ComponentSpec.from_component("scheduler", loaded)
    assert spec.default_creation_method == "from_pretrained"
    assert_same(loaded, spec.load())


# Configs of other schedulers


def names(flow_matching):
    """`_compatibles` for one kind of model; torchsde's scheduler only where torchsde is."""
    missing = set() if is_torchsde_available() else {"DPMSolverSDEScheduler"}
    names = set(SearchedSolverScheduler._compatibles) - missing
    return sorted(name for name in names if name.startswith("FlowMatch") == flow_matching)


@pytest.fixture
def no_warning(caplog):
    yield
    assert not caplog.records


@pytest.mark.parametrize("config", [{}, VP], ids=["defaults", "v-prediction"])
@pytest.mark.parametrize("name", names(flow_matching=False))
def test_a_noise_model_s_config_goes_to_another_scheduler_and_back(name, config, no_warning):
    ours = SearchedSolverScheduler(**config)
    theirs = getattr(diffusers, name).from_config(ours.config)
    assert config.items() <= theirs.config.items()
    back = SearchedSolverScheduler.from_config(theirs.config)
    assert {key: back.config[key] for key in ours.config} == dict(ours.config)


@pytest.mark.parametrize("name", names(flow_matching=False) + names(flow_matching=True))
def test_another_scheduler_s_config_comes_back_from_ours(name, no_warning):
    theirs = getattr(diffusers, name)()
    ours = SearchedSolverScheduler.from_config(theirs.config)
    assert ours.config.prediction_type == ("flow_prediction" if "FlowMatch" in name else "epsilon")
    back = type(theirs).from_config(ours.config)
    keys = theirs.config.keys() - {"_use_default_values"}
    assert {key: back.config[key] for key in keys} == {key: theirs.config[key] for key in keys}


@pytest.mark.parametrize("name", names(flow_matching=True))
def test_a_flow_model_s_config_keeps_its_shift_both_ways(name, no_warning):
    theirs = getattr(diffusers, name)(shift=3.0)
    ours = SearchedSolverScheduler.from_config(theirs.config)
    again = SearchedSolverScheduler.from_config(ours.config)
    for scheduler in (ours, again):
        assert (scheduler.config.shift, scheduler.config.prediction_type) == (3.0, "flow_prediction")
        assert type(theirs).from_config(scheduler.config).config.shift == 3.0


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"])
def test_a_flow_config_of_a_noise_scheduler_is_read_as_one(name, no_warning):
    theirs = getattr(diffusers, name)(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    ours = SearchedSolverScheduler.from_config(theirs.config)
    assert (ours.config.shift, ours.config.prediction_type) == (3.0, "flow_prediction")
    ours.set_timesteps(4)
    flow = SearchedSolverScheduler.from_config(FlowMatchEuler(shift=3.0).config)
    flow.set_timesteps(4)
    assert ours.sigmas.equal(flow.sigmas)
    back = type(theirs).from_config(ours.config)
    assert (back.config.use_flow_sigmas, back.config.flow_shift) == (True, 3.0)
    assert back.config.prediction_type == "flow_prediction"


def test_a_shift_of_one_s_own_outlives_the_other_scheduler_s(no_warning):
    theirs = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    ours = SearchedSolverScheduler.from_config(theirs.config, shift=5.0)
    assert SearchedSolverScheduler.from_config(ours.config).config.shift == 5.0


@pytest.mark.parametrize("config", [VP, FLOW], ids=["variance preserving", "flow matching"])
def test_compatible_schedulers_are_those_for_the_same_kind_of_model(config):
    compatible = {each.__name__ for each in SearchedSolverScheduler(**config).compatibles}
    assert set(names(config is FLOW)) <= compatible
    assert not set(names(config is not FLOW)) & compatible


def test_tables_follow_a_model_with_other_betas(caplog):
    file = searched(beta_schedule="scaled_linear").solver_file
    moved = SearchedSolverScheduler.from_config(DDIMScheduler(beta_schedule="linear").config, solver=file)
    assert "carried over to the same noise levels" in caplog.text
    assert moved.solver_file.step_counts == file.step_counts
    assert np.array_equal(moved.solver_file.solvers[3].sigmas, file.solvers[3].sigmas)
    same = SearchedSolverScheduler.from_config(
        DDIMScheduler(beta_schedule="scaled_linear").config, solver=replace(file, provenance={})
    )
    assert np.array_equal(same.solver_file.solvers[3].timesteps, file.solvers[3].timesteps)
