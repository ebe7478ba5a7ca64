"""The command `searched-solver`, and the measurement behind `searched-solver check`."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, UniPCMultistepScheduler
from hub_server import Hub, point_client_at
from safetensors.torch import load_file
from tiny_pipelines import build

from diffusers_searched_solver import (
    Comparison,
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    check_solver,
    list_bundled_solvers,
    load_solver_file,
    save_solver_file,
    time_grid,
)
from diffusers_searched_solver.check import FIRST_SEED, REFERENCE_STEPS, count_steps
from diffusers_searched_solver.cli import main
from diffusers_searched_solver.pipelines import ClassToImagePipeline
from diffusers_searched_solver.teacher import teacher_solver
from diffusers_searched_solver.trial import UnsuitableCallError
from search.pipeline.loading import load_pipeline
from search.settings import parse_settings
from search.teacher.splits import MOST_NOISES, SPLITS, split_seeds


ROOT = Path(__file__).parent.parent
DIT, SIT = str(ROOT / "examples" / "digits-dit"), str(ROOT / "examples" / "digits-sit")
FOUND_DIT, FOUND_SIT = (str(ROOT / "examples" / "results" / name) for name in ("digits-dit", "digits-sit"))
FIVE = ["--num-steps", "5", "--num-samples", "5", "--guidance-scale", "2"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def solver_file(pipe, counts=(3,), order=2, provenance=None) -> SolverFile:
    """Classical solvers for a pipeline's model."""
    ours = SearchedSolverScheduler.from_config(pipe.scheduler.config)
    solvers = {n: SearchedSolver.adams_bashforth(*time_grid(ours.process, n), "velocity", order) for n in counts}
    return SolverFile(solvers, ours.process, ours.config.prediction_type, provenance or {})


@pytest.fixture(scope="module")
def digits():
    pipe = ClassToImagePipeline.from_pretrained(SIT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture()
def hub(monkeypatch, tmp_path):
    hub = Hub()
    point_client_at(hub.endpoint, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


def error_of(capsys, *arguments) -> str:
    """The one line that a command ends with."""
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()[-1:]
    assert line.startswith("error: ")
    assert "Traceback" not in captured.err
    return line


# The command


def test_the_script_ends_an_error_with_one_line_and_status_two():
    """Run as the installed script runs it."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["searched-solver"].split(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    command = [sys.executable, "-c", code, "show", "pyproject.toml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: 'pyproject.toml' is not a whole safetensors file .*\n", result.stderr)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    found = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert found == ["list", "show", "compare", "merge", "export", "tabulate", "check", "convert"]


@pytest.mark.parametrize("command", ["list", "show", "compare", "merge", "export", "tabulate", "check", "convert"])
def test_every_command_has_help_that_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: searched-solver {command}")
    assert max(map(len, lines)) <= 120


# list, show, compare


def test_list_names_the_bundled_solvers(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_bundled_solvers()
    assert "facebook/DiT-XL-2-256" in lines[0]
    assert "5, 6, 7, 8, 9, 10 steps" in lines[0]


def test_list_finds_published_solvers_by_their_model(hub, capsys):
    card = "---\ntags:\n- searched-solver\nbase_model: org/{}\n---\n"
    hub.commit("me/first", {"README.md": card.format("model").encode()})
    hub.commit("me/second", {"README.md": card.format("other").encode()})
    hub.commit("me/third", {"README.md": b"---\ntags:\n- text\nbase_model: org/model\n---\n"})
    assert main(["list", "--hub"]) == 0
    assert capsys.readouterr().out.split() == ["me/first", "me/second"]
    assert main(["list", "--hub", "org/model"]) == 0
    assert capsys.readouterr().out.split() == ["me/first"]
    assert main(["list", "--hub", "org/none"]) == 0
    assert capsys.readouterr().out == "The Hub has no solver for org/none yet.\n"


def test_list_says_that_the_hub_cannot_be_asked(hub, capsys):
    with hub.fault("GET /api/models", 403):
        assert "The Hub could not be asked for solvers (" in error_of(capsys, "list", "--hub")


@pytest.mark.parametrize("kind", ["folder", "file", "bundled"])
def test_show_prints_every_number_of_the_tables(kind, capsys):
    name = {"folder": FOUND_DIT, "file": f"{FOUND_DIT}/solver/searched_solver.safetensors", "bundled": "dit-xl-2-256"}
    assert main(["show", name[kind], "--num-steps", "5"]) == 0
    out = capsys.readouterr().out
    solver = SearchedSolverScheduler.from_pretrained(
        FOUND_DIT if kind != "bundled" else name[kind]
    ).solver_file.solvers[5]
    rows = [[float(number) for number in line.split()[1:]] for line in out.split("coefficients\n")[1].splitlines()]
    for i, row in enumerate(rows[:5]):
        expected = [solver.timesteps[i], solver.alphas[i], solver.sigmas[i], *solver.coefficients[i, : i + 1]]
        # Printed with two decimals, three, or five.
        np.testing.assert_allclose(row, expected, atol=0.00501)
    np.testing.assert_allclose(rows[5], [solver.alphas[5], solver.sigmas[5]], atol=6e-6)
    assert len(rows) == 6


def test_show_says_where_the_tables_come_from(capsys):
    assert main(["show", FOUND_DIT]) == 0
    out = capsys.readouterr().out
    for key, value in load_solver_file(f"{FOUND_DIT}/solver/searched_solver.safetensors").provenance.items():
        assert re.search(rf"^{key} +{re.escape(value)}$", out, re.MULTILINE)
    assert re.findall(r"^(\d+) steps$", out, re.MULTILINE) == ["5", "8", "10"]


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r\n\x00" + "A" * 10_000


def test_what_a_file_says_of_itself_cannot_command_the_terminal(tmp_path, capsys, digits):
    save_solver_file(solver_file(digits, provenance={"base_model": HOSTILE, "\x1b[31mkey": "x"}), tmp_path / "a")
    name = str(tmp_path / "a")
    assert main(["show", name]) == 0
    assert main(["compare", name, name]) == 0
    out = capsys.readouterr().out
    assert "owned" in out
    assert all(character.isprintable() for line in out.split("\n") for character in line)
    assert max(map(len, out.split("\n"))) < 600


def test_an_error_cannot_command_the_terminal(tmp_path, capsys):
    line = error_of(capsys, "show", tmp_path / "\x1b[2Jno\nsuch\u202e")
    assert line.isprintable()


def test_compare_shows_both_on_common_step_counts_and_differences_alone_twice(capsys):
    assert main(["compare", "dit-xl-2-256", FOUND_DIT]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\d+) steps$", out, re.MULTILINE) == ["5", "8", "10"]
    assert re.search(r"^frame +A data.*\n +B velocity", out, re.MULTILINE)
    assert re.search(r"^prediction type +epsilon$", out, re.MULTILINE)
    errors = load_solver_file(f"{FOUND_DIT}/solver/searched_solver.safetensors").provenance["endpoint_errors"]
    first_error = str(json.loads(errors)["5"])[:5]
    assert re.search(rf"^endpoint_errors +A -\n +B .*\"5\": ?{first_error}", out, re.MULTILINE)
    first = SearchedSolverScheduler.from_pretrained("dit-xl-2-256").solver_file.solvers[5]
    second = load_solver_file(f"{FOUND_DIT}/solver/searched_solver.safetensors").solvers[5]
    five = out.split("\n5 steps\n")[1].split("\n8 steps\n")[0]
    for name, solver in (("A", first), ("B", second)):
        times = [float(t) for t in re.findall(rf"^ +\d+  {name} +([\d.]+)", five, re.MULTILINE)]
        np.testing.assert_allclose(times, solver.timesteps, atol=0.00501)


def test_step_counts_that_were_not_searched_are_shown_as_what_runs(capsys):
    assert main(["show", FOUND_DIT, "--num-steps", "6"]) == 0
    out = capsys.readouterr().out
    assert "6 steps\nNo solver of 6 steps was searched: this run's is derived from that of 5 and 8 steps." in out
    scheduler = SearchedSolverScheduler.from_pretrained(FOUND_DIT)
    scheduler.set_timesteps(6)
    times = [float(t) for t in re.findall(r"^ +\d+ +([\d.]+)", out.split("\n6 steps\n")[1], re.MULTILINE)]
    np.testing.assert_allclose(times, scheduler.timesteps, atol=0.00501)


def test_compare_says_if_no_step_count_is_common(tmp_path, capsys, digits):
    for name, count in (("a", 3), ("b", 4)):
        save_solver_file(solver_file(digits, [count]), tmp_path / name)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "no step count that both have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "no/such"], "Cannot load a scheduler from 'no/such'"),
        (["show", FOUND_DIT, "--num-steps", "3"], "No solver for 3 steps: this scheduler has 5, 8 and 10. From them"),
        (["show", f"{DIT}/scheduler"], "is a scheduler without a searched solver"),
        (["compare", FOUND_DIT, FOUND_SIT, "--num-steps", "51"], "No solver for 51 steps"),
        (["check", FOUND_DIT, "--pipeline", DIT, "--num-steps", "3"], "No solver for 3 steps"),
        (["convert", "--model", "sit", "--checkpoint", "none.pt", "--output", "none"], "none.pt"),
    ],
    ids=["no solver", "no step count", "classical", "compare", "check", "convert"],
)
def test_an_error_is_one_line(arguments, message, capsys, hub):
    assert message in error_of(capsys, *arguments)


def test_convert_converts(tmp_path, capsys):
    tensors = load_file(ROOT / "tests/fixtures/sit_tiny.safetensors")
    torch.save({key[2:]: value for key, value in tensors.items() if key.startswith("w.")}, tmp_path / "sit.pt")
    out = str(tmp_path / "out")
    options = ["--vae", "none", "--labels", "none", "--num-heads", "4"]
    assert (
        main(["convert", "--model", "sit", "--checkpoint", str(tmp_path / "sit.pt"), "--output", out, *options]) == 0
    )
    assert "ClassToImagePipeline.from_pretrained" in capsys.readouterr().out
    assert ClassToImagePipeline.from_pretrained(out).transformer.config.num_attention_heads == 4


# check: the measurement


def test_distances_are_those_of_the_pipelines_own_latents(digits):
    """`ClassToImagePipeline` hands its last latents out, so the same can be measured from outside."""
    own, file = digits.scheduler, solver_file(digits, [3, 4])
    calls = [{"class_labels": [k], "guidance_scale": 1.5} for k in range(5)]
    found = check_solver(digits, file, calls, [4])

    def ends(scheduler, num_steps):
        digits.scheduler = scheduler
        try:
            return [
                digits(
                    **call,
                    num_inference_steps=num_steps,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="latent",
                ).images
                for seed, call in enumerate(calls, FIRST_SEED)
            ]
        finally:
            digits.scheduler = own

    process = SearchedSolverScheduler.from_config(own.config).process
    reference = teacher_solver(process, REFERENCE_STEPS)
    targets = ends(SearchedSolverScheduler.from_config(own.config, solver=reference), REFERENCE_STEPS)
    searched, mine = ends(SearchedSolverScheduler.from_config(own.config, solver=file), 4), ends(own, 4)
    assert [each.num_steps for each in found] == [4]
    for distances, those in ((found[0].searched, searched), (found[0].own, mine)):
        expected = [(end - target).square().mean().sqrt().item() for end, target in zip(those, targets, strict=True)]
        np.testing.assert_array_equal(distances, expected)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_solver_is_measured_on_noises_that_its_search_did_not_see(seed):
    fitted = {each for split in SPLITS for each in split_seeds(seed, split, MOST_NOISES)}
    assert fitted.isdisjoint(range(FIRST_SEED, FIRST_SEED + 10**5))


@pytest.mark.parametrize("name", ["dit", "flux", "wan"])
def test_any_pipeline_can_be_measured_and_is_left_as_it_was(name):
    case = build(name)
    own, steps = case.pipe.scheduler, []
    one_sample = {**case.inputs, "class_labels": [3]} if name == "dit" else case.inputs
    found = check_solver(case.pipe, solver_file(case.pipe), [one_sample] * 5, on_step=lambda: steps.append(1))
    assert np.isfinite([found[0].searched, found[0].own, found[0].best]).all()
    # It is chosen on these noises, from all settings.
    assert found[0].ratio_to_best > 0.99 * found[0].ratio
    assert (found[0].own > 0).all()
    assert len(steps) == count_steps(own.config, [3], 5)
    assert case.pipe.scheduler is own
    assert "step" not in vars(own)


def test_a_pipeline_that_fails_is_left_as_it_was(digits):
    own = digits.scheduler
    with pytest.raises(UnsuitableCallError, match="TypeError: .* unexpected keyword argument 'no_such'"):
        check_solver(digits, solver_file(digits), [{"class_labels": [1], "no_such": 1}] * 5)
    assert digits.scheduler is own
    assert "step" not in vars(own)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
def test_a_scheduler_that_draws_noise_is_warned_about_and_others_are_not(cls, caplog):
    pipe = DiTPipeline.from_pretrained(DIT)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    check_solver(pipe, solver_file(pipe, [8]), [{"class_labels": [k]} for k in range(5)])
    warned = [record.getMessage() for record in caplog.records if "it draws noise" in record.getMessage()]
    assert len(warned) == (cls is DDPMScheduler)
    if warned:
        assert re.match(r"The pipeline's DDPMScheduler ends [\d.]+ from the reference in 64 steps", warned[0])


def test_a_reference_that_is_not_finite_is_refused(digits):
    handle = digits.transformer.register_forward_hook(lambda module, args, output: (output[0] * float("nan"),))
    try:
        with pytest.raises(ValueError, match="The reference of sample 0 is not finite. Run the pipeline in float32"):
            check_solver(digits, solver_file(digits), [{"class_labels": [1]}] * 5)
    finally:
        handle.remove()


def compared(searched, own, best=None) -> Comparison:
    return Comparison(5, searched, own, own if best is None else best, "UniPC 3, shift 1")


def test_a_solver_that_the_best_of_diffusers_beats_is_not_better():
    found = compared(np.full(8, 0.5), np.ones(8), np.full(8, 0.4))
    assert (found.ratio, found.ratio_to_best, found.is_better) == (0.5, pytest.approx(1.25), False)


def test_a_solver_that_diverges_is_not_better():
    assert not compared(np.array([0.1] * 7 + [np.nan]), np.ones(8)).is_better
    assert not compared(np.full(8, np.inf), np.ones(8)).is_better


def test_a_solver_of_the_other_process_is_refused(digits):
    other = SearchedSolverScheduler.from_pretrained("dit-xl-2-256").solver_file
    with pytest.raises(ValueError, match="variance preserving process, this model has a flow matching one"):
        check_solver(digits, other, [{"class_labels": [1]}] * 5)


def test_too_few_samples_are_refused(digits):
    with pytest.raises(ValueError, match="There are 4 samples, expected at least 5"):
        check_solver(digits, solver_file(digits), [{"class_labels": [1]}] * 4)


@pytest.mark.parametrize(
    ("wins", "samples", "better"),
    [(5, 5, True), (4, 5, False), (7, 8, True), (6, 8, False), (0, 8, False), (12, 16, True), (11, 16, False)],
)
def test_better_is_what_chance_gives_once_in_twenty_times_at_most(wins, samples, better):
    """Of 8 fair coins, 7 or more fall the same way, which is chosen before, in 9 of 256 throws; 6 or more in 37."""
    searched = np.where(np.arange(samples) < wins, 0.5, 1.01)
    found = compared(searched, np.ones(samples))
    assert (found.wins, found.is_better) == (wins, better)


def test_a_solver_that_wins_often_and_loses_much_is_not_better():
    assert not compared(np.array([0.9] * 7 + [9.0]), np.ones(8)).is_better


# check: the command


def test_check_finds_a_good_solver_good(capsys):
    assert main(["check", FOUND_DIT, "--pipeline", DIT, *FIVE]) == 0
    out = capsys.readouterr().out
    answer = (
        r"^5 steps: use it: ([\d.]+)x the error of your DDIMScheduler and ([\d.]+)x that of the best of diffusers "
        r"\(\w.*, \w+\), on 5 noises.$"
    )
    own, best = map(float, re.search(answer, out, re.M).groups())
    # The report's 0.17 and 0.26 are of best settings, and of other noises.
    assert 0.1 < own < 0.3 and own < best < 0.5
    assert re.search(r"^ +5  0\.0\d+ \(.*5 of 5$", out, re.MULTILINE)
    assert "Search for" not in out


def test_check_finds_a_bad_solver_bad_and_says_how_to_search(tmp_path, capsys, digits):
    """One whose nodes are all near the noise."""
    good = solver_file(digits, [5])
    sigmas = np.append(1 - 0.01 * np.arange(5), 0.0)
    bad = replace(good.solvers[5], timesteps=1000 * sigmas[:-1], alphas=1 - sigmas, sigmas=sigmas)
    save_solver_file(replace(good, solvers={5: bad}), tmp_path / "bad")
    options = ["--class-labels", "three", "4", "--call-kwargs", '{"guidance_channels": 1}', *FIVE]
    assert main(["check", str(tmp_path / "bad"), "--pipeline", SIT, *options]) == 1
    *_, answer, _, command = capsys.readouterr().out.splitlines()
    assert answer.startswith("5 steps: keep the best of diffusers (")
    launched = shlex.split(command)
    assert launched[:3] == ["accelerate", "launch", "search/run.py"]
    searched = parse_settings(launched[3:])
    assert (searched.pipeline, searched.num_steps, searched.guidance_scale) == (SIT, (5,), (2.0,))
    assert (searched.class_labels, searched.call_kwargs) == (("three", "4"), {"guidance_channels": 1})


def test_check_finds_the_pipelines_own_scheduler_no_better_than_itself(tmp_path, capsys, digits):
    """Flow Euler is the table with the identity for coefficients on its scheduler's nodes."""
    own = digits.scheduler
    own.set_timesteps(5)
    sigmas = own.sigmas.double().numpy()
    euler = SearchedSolver(own.timesteps.double().numpy(), 1 - sigmas, sigmas, np.eye(5), "velocity")
    file = solver_file(digits, [5])
    save_solver_file(replace(file, solvers={5: euler}), tmp_path / "euler")
    assert main(["check", str(tmp_path / "euler"), "--pipeline", SIT, *FIVE]) == 1
    assert " 1.00 (1.00, 1.00) " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", "no/such"], "no/such"),
        (["--class-labels", "cat"], "There is no class 'cat', but eight, five"),
        (["--prompts", "a cat"], "DiTPipeline takes no `prompt`, but class_labels, guidance_scale"),
        (["--call-kwargs", '{"height": 64}'], "DiTPipeline takes no `height`"),
        (
            ["--call-kwargs", '{"guidance_scale": "high"}'],
            "The call of DiTPipeline with guidance_scale=high, class_labels=[0] failed: TypeError: ",
        ),
        (["--num-samples", "2"], "There are 2 samples, expected at least 5"),
    ],
    ids=["pipeline", "label", "prompt", "argument", "value", "samples"],
)
def test_check_says_in_one_line_what_is_wrong(arguments, message, capsys, hub):
    assert message in error_of(capsys, "check", FOUND_DIT, "--pipeline", DIT, "--num-steps", "5", *arguments)


def test_call_kwargs_have_to_be_an_object(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["check", FOUND_DIT, "--pipeline", DIT, "--call-kwargs", "[1]"])
    assert "invalid json_object value: '[1]'" in capsys.readouterr().err


def test_check_agrees_with_the_search_on_a_solver_that_it_found(capsys):
    """The errors in the report are of other noises; both are estimates of the same."""
    report = json.loads(Path(FOUND_SIT, "report.json").read_text())
    rows = report["evaluation"]["results"]["5"]
    searched = next(row["endpoint_error"] for row in rows if row["solver"] == "searched")
    pipe = load_pipeline(SIT, torch.float32, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    file = SearchedSolverScheduler.from_pretrained(FOUND_SIT).solver_file
    (found,) = check_solver(pipe, file, [{"class_labels": [k], "guidance_scale": 2.0} for k in range(10)], [5])
    # Ten samples whose errors differ by a factor of about two.
    assert np.sqrt(np.mean(found.searched**2)) == pytest.approx(searched, rel=0.4)


# Tables of diffusers' schedulers


def test_a_scheduler_of_diffusers_is_written_as_a_solver_that_from_pretrained_loads(tmp_path, capsys):
    options = ["--scheduler", "UniPCMultistepScheduler", "--config", '{"solver_order": 3}', "--num-steps", "5", "8"]
    assert main(["tabulate", DIT, *options, "--output", str(tmp_path / "unipc")]) == 0
    assert "UniPCMultistepScheduler in 5, 8 steps" in capsys.readouterr().out
    pipe = load_pipeline(DIT, torch.float32, torch.device("cpu"))
    unipc = UniPCMultistepScheduler.from_config(pipe.scheduler.config, solver_order=3)
    images = []
    for scheduler in (unipc, SearchedSolverScheduler.from_pretrained(tmp_path / "unipc")):
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(class_labels=[3], num_inference_steps=8, generator=generator, output_type="np").images)
    np.testing.assert_allclose(*images, atol=1e-4)
    assert main(["show", str(tmp_path / "unipc"), "--num-steps", "5"]) == 0


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            DIT,
            ["--scheduler", "DDPMScheduler"],
            "DDPMScheduler of 5 steps is not a table of one call a step: it dr",
        ),
        (DIT, ["--scheduler", "Sampler"], "'Sampler' is none of diffusers' schedulers"),
        (DIT, ["--config", '{"shft": 3}'], "DDIMScheduler has no config entry 'shft'"),
    ],
    ids=["no table", "no scheduler", "no entry"],
)
def test_what_cannot_be_tabulated_is_an_error_and_nothing_is_written(source, options, message, tmp_path, capsys):
    assert main(["tabulate", source, *options, "--num-steps", "5", "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
