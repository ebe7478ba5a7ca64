"""Solver files: a round trip keeps every bit, and a file that breaks its promise is refused by name."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SolverFile,
    SolverFileError,
    VariancePreserving,
    load_solver_file,
    save_solver_file,
    time_grid,
)


FLOW = FlowMatching()


def make_file(process=FLOW, steps=(2, 3), consistent=True):
    solvers = {}
    for n in steps:
        solver = SearchedSolver.adams_bashforth(*time_grid(process, n, 2.0), "velocity", 2)
        factor = 1 if consistent else 1.01
        solvers[n] = SearchedSolver(
            solver.timesteps, solver.alphas, solver.sigmas, factor * solver.coefficients, "velocity", consistent
        )
    return SolverFile(solvers, process, "flow_prediction", {"base_model": "me/mine", "note": "größer"})


@pytest.mark.parametrize("consistent", [True, False], ids=["row sums one", "row sums free"])
@pytest.mark.parametrize(
    "process", [FlowMatching(500), VariancePreserving(beta_schedule="scaled_linear", trained_betas=(0.1, 0.2))]
)
def test_a_round_trip_keeps_every_bit(tmp_path, process, consistent):
    file = make_file(process, consistent=consistent)
    save_solver_file(file, tmp_path / "new" / "solver.safetensors")
    loaded = load_solver_file(tmp_path / "new" / "solver.safetensors")
    assert (loaded.process, loaded.prediction_type, loaded.provenance) == (
        file.process,
        file.prediction_type,
        file.provenance,
    )
    assert loaded.step_counts == [2, 3]
    for n, solver in file.solvers.items():
        assert (loaded.solvers[n].frame, loaded.solvers[n].consistent) == (solver.frame, consistent)
        for name in ("timesteps", "alphas", "sigmas", "coefficients"):
            assert np.array_equal(getattr(loaded.solvers[n], name), getattr(solver, name))


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "solver.safetensors"
    save_solver_file(make_file(), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_solver_file(make_file(steps=(4,)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_solvers_of_one_file_share_a_frame():
    velocity = make_file().solvers[2]
    data = SearchedSolver.adams_bashforth(*time_grid(FlowMatching(), 3), "data", 1)
    with pytest.raises(ValueError, match="one frame"):
        SolverFile({2: velocity, 3: data}, FlowMatching(), "flow_prediction")


def _parts():
    """Tensors and metadata of a good file, to be broken."""
    file = make_file(steps=(3,))
    solver = file.solvers[3]
    tensors = {f"3.{name}": getattr(solver, name).copy() for name in ("timesteps", "alphas", "sigmas", "coefficients")}
    metadata = {
        "format_version": "1",
        "frame": "velocity",
        "row_sums": "one",
        "process": json.dumps({"kind": "flow_matching", "num_train_timesteps": 1000}),
        "prediction_type": "flow_prediction",
    }
    return tensors, metadata


def _tensor(name, change):
    def apply(tensors, metadata):
        tensors[name] = change(tensors[name])

    return apply


def _metadata(key, value):
    def apply(tensors, metadata):
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value

    return apply


def _put(place, value):
    def change(table):
        table[place] = value
        return table

    return change


BREAKAGES = {
    "nan": (_tensor("3.coefficients", _put((1, 0), np.nan)), r"3\.\*.*`coefficients` holds nan at \[1, 0\]"),
    "infinite": (_tensor("3.sigmas", _put(0, np.inf)), "`sigmas` holds inf"),
    "row sum": (_tensor("3.coefficients", _put((0, 0), 1.5)), "Row 0 of `coefficients` sums to 1.5, expected 1"),
    "above the diagonal": (_tensor("3.coefficients", _put((0, 2), 1.0)), "above the diagonal"),
    "node order": (_tensor("3.sigmas", lambda t: t[::-1].copy()), "`sigmas` goes down to 0"),
    "time order": (_tensor("3.timesteps", lambda t: t[::-1].copy()), "strictly decreasing"),
    "dtype": (_tensor("3.alphas", lambda t: t.astype(np.float32)), "'3.alphas' has dtype F32, expected F64"),
    "shape": (_tensor("3.coefficients", lambda t: t[:2]), r"'3.coefficients' has shape \[2, 3\], expected \[3, 3\]"),
    "step count": (_tensor("3.timesteps", lambda t: t[:2]), r"'3.timesteps' has shape \[2\], expected \[3\]"),
    "missing tensor": (lambda tensors, metadata: tensors.pop("3.alphas"), "tensor '3.alphas' is missing"),
    "stray tensor": (lambda t, m: t.update(x=np.ones(1)), "unexpected tensor 'x'"),
    "odd count": (lambda t, m: t.update({"03.alphas": np.ones(4)}), "unexpected tensor '03.alphas'"),
    "huge count": (lambda t, m: t.update({"999.alphas": np.ones(4)}), "expected 1 to 256"),
    "no solver": (lambda tensors, metadata: tensors.clear(), "holds no solver"),
    "no version": (_metadata("format_version", None), "not a solver file"),
    "newer version": (_metadata("format_version", "2"), "format version 2, this installation reads up to 1"),
    "odd version": (_metadata("format_version", "one"), "format version 'one'"),
    "frame": (_metadata("frame", "noise"), "metadata `frame` is 'noise', expected one of data, velocity"),
    "row sums": (_metadata("row_sums", None), "metadata `row_sums` is None, expected one of one, free"),
    "prediction type": (_metadata("prediction_type", "x"), "metadata `prediction_type` is 'x'"),
    "process": (_metadata("process", "{}"), "metadata `process` cannot be read"),
    "process fields": (_metadata("process", '{"kind": "flow_matching", "beta": 1}'), "`process` cannot be read"),
    "process nesting": (_metadata("process", "[" * 100000), "`process` cannot be read"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_file_is_refused_by_tensor_value_and_remedy(tmp_path, name):
    change, message = BREAKAGES[name]
    tensors, metadata = _parts()
    change(tensors, metadata)
    save_file(tensors, tmp_path / "solver.safetensors", metadata)
    with pytest.raises(SolverFileError, match=message):
        load_solver_file(tmp_path / "solver.safetensors")


def test_the_unbroken_parts_are_a_good_file(tmp_path):
    save_file(_parts()[0], tmp_path / "solver.safetensors", _parts()[1])
    assert load_solver_file(tmp_path / "solver.safetensors").step_counts == [3]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04\x95pickle", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"],
    ids=["empty", "pickle", "huge header", "header of another type"],
)
def test_bytes_that_are_not_safetensors_are_refused(tmp_path, content):
    (tmp_path / "solver.safetensors").write_bytes(content)
    with pytest.raises(SolverFileError, match="not a whole safetensors file"):
        load_solver_file(tmp_path / "solver.safetensors")


def test_a_cut_file_is_refused_at_every_length(tmp_path):
    path = tmp_path / "solver.safetensors"
    save_solver_file(make_file(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(SolverFileError):
            load_solver_file(path)


def test_a_file_far_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "solver.safetensors"
    with open(path, "wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(SolverFileError, match="a solver file at most"):
        load_solver_file(path)
