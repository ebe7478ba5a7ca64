"""Files from elsewhere: whatever is in them, loading ends quickly, in a valid scheduler or a short error."""

import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import fuzz_solver_file
import numpy as np
import pytest
import torch
from fuzz_solver_file import fuzz
from mutations import CONFIG, MUTATIONS, join, split, write_good_folder
from safetensors.numpy import save_file

from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    SolverFileError,
    VariancePreserving,
    load_solver_file,
    save_solver_file,
    time_grid,
)
from diffusers_searched_solver.history import History
from diffusers_searched_solver.serialization import SOLVER_FILE


@pytest.fixture
def folder(tmp_path) -> Path:
    """A valid scheduler's folder."""
    write_good_folder(tmp_path / "scheduler", random.Random(0))
    return tmp_path / "scheduler"


def test_a_thousand_mutations_end_in_a_valid_scheduler_or_an_error_within_a_second_and_200_mb():
    program = Path(fuzz_solver_file.__file__)
    command = [sys.executable, program, "--cases", "1000", "--seed", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "1000 cases" in result.stdout
    for kind in MUTATIONS:
        assert re.search(rf"^{kind} +.*\d+ (SolverFileError|OSError)", result.stdout, re.MULTILINE)


def burn():
    started = time.process_time()
    while time.process_time() < started + 0.4:
        pass


def fail(error: Exception):
    raise error


OFFENCES = {
    "an exception": (lambda: fail(KeyError("key")), "KeyError"),
    "a slow case": (burn, r"0\.\d s"),
    "a large allocation": (lambda: np.ones(4 * 10**7), r"3\d\d MB"),
    "a write": (lambda: Path(os.devnull).write_text(""), r"loading did open.*/dev/null"),
    "a pickle": (lambda: pickle.loads(pickle.dumps(random.Random)), r"loading did pickle\.find_class"),
    "a program": (lambda: subprocess.run(["true"]), r"loading did subprocess\.Popen"),
    "control characters": (lambda: fail(ValueError("\x1b[2J")), "control characters"),
    "a long message": (lambda: fail(OSError("x" * 10**5)), "the message has 100000 characters"),
    "an image that is not finite": (None, "the image of . steps is"),
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_the_fuzzer_notices(tmp_path, monkeypatch, offence):
    action, message = OFFENCES[offence]
    assert fuzz(3, 0, tmp_path)
    monkeypatch.setattr(fuzz_solver_file, "SECONDS", 0.3)
    if action is None:
        monkeypatch.setattr(History, "step", lambda self, sample: sample * torch.nan)
    else:
        case = lambda folder: action() if folder.name == "case" else None  # noqa: E731
        monkeypatch.setattr(fuzz_solver_file, "load_and_run", case)
    with pytest.raises(AssertionError, match=message):
        fuzz(3, 0, tmp_path)


# What the fuzzer has found, and what it is too unlikely to find


def change_header(path: Path, change):
    header, data = split(path.read_bytes())
    change(header)
    path.write_bytes(join(json.dumps(header), data))


HEADERS = {
    "a tensor of no bytes and endless rows": (
        lambda header: header.update({"1.timesteps": {"dtype": "F64", "shape": [0, 2**62], "data_offsets": [0, 0]}}),
        r"tensor '1\.timesteps' has shape \[0, 4611686018427387904\], expected \[1\]",
    ),
    "a tensor of a hundred dimensions": (
        lambda header: header["3.alphas"].update(shape=[1] * 99 + [4]),
        r"tensor '3\.alphas' has shape \[1, 1, 1, 1, 1, 1, \.\.\.\], expected \[4\]",
    ),
    "a name that a terminal obeys": (
        lambda header: header.update({"\x1b[2J": header.pop("3.alphas")}),
        r"unexpected tensor '\\x1b\[2J'",
    ),
    "a name of a million characters": (
        lambda header: header.update({"x" * 10**6: header.pop("3.alphas")}),
        r"unexpected tensor 'x+\.\.\.x+', expected",
    ),
}


@pytest.fixture
def solver_file(tmp_path) -> Path:
    """A good solver file of three steps."""
    path = tmp_path / "solver.safetensors"
    solver = SearchedSolver.adams_bashforth(*time_grid(FlowMatching(), 3), "velocity", 2)
    save_solver_file(SolverFile({3: solver}, FlowMatching(), "flow_prediction"), path)
    return path


@pytest.mark.parametrize("case", HEADERS)
def test_a_tensor_is_refused_by_its_header_alone(solver_file, case):
    change, message = HEADERS[case]
    change_header(solver_file, change)
    with pytest.raises(SolverFileError, match=message) as caught:
        load_solver_file(solver_file)
    assert len(str(caught.value)) < 500


def vp(**fields) -> dict:
    return {"kind": "variance_preserving", **fields}


PROCESSES = {
    "a table of gigabytes": (vp(num_train_timesteps=10**10), "`num_train_timesteps` is 10000000000, expected a whole"),
    "no timesteps": (vp(num_train_timesteps=0), "`num_train_timesteps` is 0, expected"),
    "true timesteps": (vp(num_train_timesteps=True), "`num_train_timesteps` is True, expected"),
    "half a timestep": ({"kind": "flow_matching", "num_train_timesteps": 0.5}, "is 0.5, expected a whole number"),
    "negative noise": (vp(beta_start=-0.1), "`beta_start` is -0.1, expected a number above 0"),
    "no number": (vp(beta_end="0.02"), "`beta_end` is '0.02', expected a number"),
    "nan": (vp(beta_end=float("nan")), "`beta_end` is nan, expected a number"),
    "noise too small to see": (vp(beta_start=1e-30), "make no noise process: the signal must fall"),
    "an unknown schedule": (vp(beta_schedule="cubic"), "`beta_schedule` is 'cubic', which diffusers"),
    "a schedule that nobody reads": (
        vp(beta_schedule=[0.5] * 10**5, trained_betas=[0.01, 0.05, 0.2]),
        "`beta_schedule` is .*, expected the name of one",
    ),
    "betas that are text": (vp(trained_betas="0.1"), r"`trained_betas` is '0\.1', expected a list of numbers"),
    "a beta beyond one": (vp(trained_betas=[0.1, 1.5]), r"`trained_betas\[1\]` is 1\.5, expected"),
    "a beta beyond float64": (vp(trained_betas=[10**400]), "expected a list of numbers"),
    "a hundred thousand betas": (vp(trained_betas=[0.1] * 10**5), r"`len\(trained_betas\)` is 100000, expected"),
    "a rescaling that is a list": (
        vp(rescale_betas_zero_snr=[0]),
        r"`rescale_betas_zero_snr` is \[0\], expected True",
    ),
    "a shift of nothing": (vp(snr_shift_scale=0), "`snr_shift_scale` is 0, expected a number above 0"),
    "a list in place of a kind": ({"kind": ["flow_matching"]}, "expected an object with `kind` one of"),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_a_noise_process_that_is_none_is_refused_before_its_tables_are_made(solver_file, case):
    fields, message = PROCESSES[case]
    text = json.dumps(fields)
    change_header(solver_file, lambda header: header["__metadata__"].update(process=text))
    with pytest.raises(SolverFileError, match=rf"metadata `process` cannot be read \((?s:.*){message}"):
        load_solver_file(solver_file)


def flow_tables(**changes) -> dict:
    timesteps, alphas, sigmas = time_grid(FlowMatching(), 3)
    tables = {"timesteps": timesteps, "alphas": alphas, "sigmas": sigmas, "coefficients": np.eye(3)}
    return {f"3.{name}": np.array(table, dtype=np.float64) for name, table in {**tables, **changes}.items()}


TABLES = {
    "nodes of another process": (
        {"sigmas": [1.0, 0.9, 0.4, 0.0]},
        "Node 1 .* alpha 0.33.* and sigma 0.9, expected alpha",
    ),
    "nodes a million times too large": ({"alphas": [0, 3e5, 6e5, 1e6], "sigmas": [1e6, 6e5, 3e5, 0]}, "Node 0 of"),
    "a network time beyond float32": ({"timesteps": [1e300, 500, 100]}, r"go up to 1e\+300, expected at most 1100"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_are_not_of_the_process_they_name_are_refused(solver_file, case):
    changes, message = TABLES[case]
    metadata = split(solver_file.read_bytes())[0]["__metadata__"]
    save_file(flow_tables(**changes), solver_file, metadata)
    with pytest.raises(SolverFileError, match=message):
        load_solver_file(solver_file)


def test_a_table_that_overflows_half_precision_is_refused_with_how_far_it_goes():
    """x = noise + sum of -1/3 * c * m over three steps, so |x| goes up to 1 + c for outputs of size one."""
    for size, refused in ((65_000, False), (66_000, True)):
        tables = {name[2:]: table for name, table in flow_tables(coefficients=size * np.eye(3)).items()}
        solver = SearchedSolver(**tables, frame="velocity", consistent=False)
        assert solver.reach("flow_prediction") == pytest.approx(1 + size)
        config = {"prediction_type": "flow_prediction"}
        if refused:
            with pytest.raises(ValueError, match=r"3 steps makes numbers of up to 6\.6e\+04 .* ends at 65504"):
                SearchedSolverScheduler.from_config(config, solver=solver)
        else:
            assert SearchedSolverScheduler.from_config(config, solver=solver).solver_file


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_table_that_overflows_float64_is_refused():
    tables = {name[2:]: table for name, table in flow_tables(coefficients=np.tril(np.full((3, 3), 1.7e308))).items()}
    solver = SearchedSolver(**tables, frame="velocity", consistent=False)
    with pytest.raises(ValueError, match="3 steps makes numbers of up to (inf|nan) "):
        SearchedSolverScheduler.from_config({"prediction_type": "flow_prediction"}, solver=solver)


def test_noise_predictions_at_a_node_of_pure_noise_are_refused():
    timesteps, alphas, sigmas = time_grid(VariancePreserving(), 3)
    alphas[0], sigmas[0] = 0, 1
    solver = SearchedSolver(timesteps, alphas, sigmas, np.eye(3), "data")
    with pytest.raises(
        ValueError, match="At alpha 0 and sigma 1 a prediction of kind 'epsilon' says nothing of 'sample'"
    ):
        SearchedSolverScheduler.from_config({"prediction_type": "epsilon"}, solver=solver)
    assert SearchedSolverScheduler.from_config({"prediction_type": "v_prediction"}, solver=solver).solver_file


CONFIGS = {
    "a list": ("[]", "holds a JSON list, expected an object"),
    "a number of ten thousand digits": ('{"shift": ' + "9" * 10**4 + "}", "integer string conversion"),
    "deep nesting": ("[" * 10**5, "cannot be read as JSON .*recursion"),
    "a key that is a method": ('{"get": 1}', "is no scheduler's config: `get` is 1"),
    "a key that is an argument": ('{"self": 1}', "is no scheduler's config: `self` is 1"),
    "a class that is no scheduler": ('{"_class_name": "StableDiffusionPipeline"}', "`_class_name` is 'StableDiff"),
    "defaults that are no names": ('{"_use_default_values": 1}', "`_use_default_values` is 1"),
    "an unknown prediction": ('{"prediction_type": "x"}', "`prediction_type` is 'x', expected one of sample"),
    "a table of gigabytes": ('{"num_train_timesteps": 10000000000}', "expected a whole number from 1 to 10000"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_none_is_refused(folder, case):
    text, message = CONFIGS[case]
    (folder / CONFIG).write_text(text)
    with pytest.raises((OSError, ValueError), match=message):
        SearchedSolverScheduler.from_pretrained(folder)


def test_a_config_far_too_large_is_refused_unread(folder):
    with open(folder / CONFIG, "wb") as stream:
        stream.truncate(2**32)
    with pytest.raises(OSError, match="has 4294967296 bytes, a config at most"):
        SearchedSolverScheduler.from_pretrained(folder)


# Nothing is executed, and nothing leaves its folder


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [CONFIG, SOLVER_FILE])
def test_a_pickle_in_place_of_a_file_is_not_read(tmp_path, folder, name):
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises((OSError, SolverFileError)):
        SearchedSolverScheduler.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


PLACES = {
    "a folder": (lambda path: path.mkdir(), SolverFileError, "is not a file"),
    "a pipe that never ends": (os.mkfifo, SolverFileError, "is not a file"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), SolverFileError, "is not a file"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), FileNotFoundError, "No such file"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_no_solver_and_not_the_lack_of_one(folder, place):
    make, error, message = PLACES[place]
    (folder / SOLVER_FILE).unlink()
    make(folder / SOLVER_FILE)
    with pytest.raises(error, match=message):
        SearchedSolverScheduler.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../other", "a/../../other", "/other"], ids=["up", "up from below", "absolute"])
@pytest.mark.parametrize("source", ["folder", "repository"])
def test_a_subfolder_cannot_lead_out_of_its_folder_or_repository(tmp_path, folder, source, name):
    write_good_folder(tmp_path / "other", random.Random(1))
    (folder / "a").mkdir()
    name = str(tmp_path / "other") if name == "/other" else name
    with pytest.raises(OSError, match=f"`subfolder` is '{name}', which leads out of it"):
        SearchedSolverScheduler.from_pretrained(folder if source == "folder" else "org/none", subfolder=name)


@pytest.mark.parametrize("name", ["../solvers/sit-xl-2-256", "../x", "..", ".", "solver"])
def test_a_name_that_is_no_bundled_solver_s_finds_none(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="Cannot load a scheduler from"):
        SearchedSolverScheduler.from_pretrained(name, local_files_only=True)
    with pytest.raises(FileNotFoundError, match="no bundled solver of that name"):
        SearchedSolverScheduler.from_config({"prediction_type": "flow_prediction"}, solver=name)


def test_saving_into_a_folder_with_links_writes_beside_them_and_not_through_them(tmp_path, folder):
    scheduler = SearchedSolverScheduler.from_pretrained(folder)
    outside, target = tmp_path / "outside", tmp_path / "clone"
    (outside / "solver").mkdir(parents=True)
    for name in (CONFIG, SOLVER_FILE):
        (outside / name).write_text("precious")
    target.mkdir()
    (target / CONFIG).symlink_to(outside / CONFIG)
    (target / "solver").symlink_to(outside / "solver")
    scheduler.save_pretrained(target)
    SearchedSolverScheduler(prediction_type="flow_prediction").save_pretrained(target)
    assert {(outside / name).read_text() for name in (CONFIG, SOLVER_FILE)} == {"precious"}
