"""Solver files: the tables of several step counts in one safetensors file, read with suspicion and written whole."""

import json
import os
import reprlib
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .configs import process_from_json, process_to_json
from .process import PREDICTION_TYPES, NoiseProcess
from .solver import SearchedSolver


FORMAT_VERSION = 1
# On the Hub and on disk, relative to `scheduler_config.json`. In a sub-folder, because a safetensors file right beside
# the scheduler's config makes diffusers take the scheduler for a model and skip the rest of a pipeline's weights.
SOLVER_FILE = "solver/searched_solver.safetensors"
MAX_BYTES = 4 * 2**20
MAX_STEPS = 256
_TABLES = ("timesteps", "alphas", "sigmas", "coefficients")
_ROW_SUMS = {"one": True, "free": False}
# Tables are float64 and the laws of the processes hold to rounding; published tables are exact to 1e-15 once imported.
_NODE_TOLERANCE = 1e-6
# Tables of schedulers that step to other nodes than they go on from are off by a factor; so may be those whose rows
# have free sums, within these bounds.
_NODE_FACTORS = 0.5, 2.0
# As a share of the end of the process: a search may call the network a little beyond it.
LATEST_CALL = 1.1


class SolverFileError(ValueError):
    """A solver file cannot be trusted; the message names what was found, what was expected and what to do."""


@dataclass(frozen=True)
class SolverFile:
    """
    What a solver file holds.

    Args:
        solvers (`dict[int, SearchedSolver]`): By number of steps; all of one frame and one kind of row sums.
        process (`NoiseProcess`): The noise process of the network that the tables were made for.
        prediction_type (`str`): What that network predicts, one of `PREDICTION_TYPES`.
        provenance (`dict[str, str]`): How the tables came to be: base model, guidance scale, teacher, errors measured
            and so on. Free text, untrusted, for people to read.

    Raises:
        ValueError: If the solvers differ in kind, or one has nodes or timesteps that the process does not have.
    """

    solvers: Mapping[int, SearchedSolver]
    process: NoiseProcess
    prediction_type: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        kinds = {(solver.frame, solver.consistent) for solver in self.solvers.values()}
        if len(kinds) != 1:
            raise ValueError(f"A solver file holds solvers of one frame and one kind of row sums, found {kinds or 0}.")
        for num_steps, solver in self.solvers.items():
            if solver.num_steps != num_steps:
                raise ValueError(f"The solver filed under {num_steps} steps has {solver.num_steps}.")
            _check_on_process(solver, self.process)
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"`prediction_type` is {self.prediction_type!r}, expected one of {PREDICTION_TYPES}.")

    @property
    def step_counts(self) -> list[int]:
        return sorted(self.solvers)


def _check_on_process(solver: SearchedSolver, process: NoiseProcess):
    factors = process.scale(solver.alphas, solver.sigmas)
    least, largest = (1 - _NODE_TOLERANCE, 1 + _NODE_TOLERANCE) if solver.consistent else _NODE_FACTORS
    off = np.flatnonzero((factors < least) | (factors > largest))
    if off.size:
        raise ValueError(
            f"Node {off[0]} of the solver of {solver.num_steps} steps has alpha {solver.alphas[off[0]]:g} and sigma "
            f"{solver.sigmas[off[0]]:g}, expected {process.law} as in a {process.kind.replace('_', ' ')} process. Use "
            "the process that the tables were made for."
        )
    latest = LATEST_CALL * process.max_timestep
    if solver.timesteps[0] > latest:
        raise ValueError(
            f"`timesteps` of the solver of {solver.num_steps} steps go up to {solver.timesteps[0]:g}, expected at "
            f"most {latest:g} for a process that ends at {process.max_timestep:g}."
        )


def save_solver_file(file: SolverFile, path: str | os.PathLike) -> None:
    """
    Write a solver file. It is written aside and renamed, so `path` is never half written.

    Args:
        path: Where to; its folder is made if need be.
    """
    any_solver = next(iter(file.solvers.values()))
    metadata = {
        **{f"provenance.{key}": str(value) for key, value in file.provenance.items()},
        "format_version": str(FORMAT_VERSION),
        "frame": any_solver.frame,
        "row_sums": "one" if any_solver.consistent else "free",
        "process": process_to_json(file.process),
        "prediction_type": file.prediction_type,
    }
    tensors = {f"{n}.{name}": getattr(solver, name) for n, solver in file.solvers.items() for name in _TABLES}
    write_whole(Path(path), _with_sorted_header(save(tensors, metadata)))


def _with_sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its header in alphabetical order, so that equal solvers make equal files."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and rename it into place: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def load_solver_file(path: str | os.PathLike) -> SolverFile:
    """
    Read a solver file. Only tensors and strings are read; nothing in the file is executed.

    Raises:
        FileNotFoundError: If there is no file at `path`.
        SolverFileError: If anything in it is not what the format promises.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise SolverFileError(f"'{path}' is not a file. Put a solver file there, or remove what is there.")
    if size > MAX_BYTES:
        raise SolverFileError(f"'{path}' has {size} bytes, a solver file at most {MAX_BYTES}.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            tables = {n: _read_tables(path, file, n) for n in _step_counts(path, file.keys())}
    except SafetensorError as error:
        raise SolverFileError(
            f"'{path}' is not a whole safetensors file ({str(error)[:200]!r}). Download or save it again."
        ) from error
    frame, consistent, process, prediction_type = _read_header(path, metadata)
    provenance = {
        key.removeprefix("provenance."): value for key, value in metadata.items() if key.startswith("provenance.")
    }
    solvers = {n: _solver(path, tables[n], n, frame, consistent) for n in tables}
    try:
        return SolverFile(solvers, process, prediction_type, provenance)
    except ValueError as error:
        raise SolverFileError(f"'{path}': {error} Download the file again or search anew.") from error


def _check_version(path: Path, metadata: Mapping[str, str]):
    version = metadata.get("format_version")
    if version is None:
        raise SolverFileError(
            f"'{path}' has no `format_version` in its metadata, so it is not a solver file. Files of this kind are "
            "written by `SearchedSolverScheduler.save_pretrained` and `search/run.py`."
        )
    if not version.isdecimal() or int(version[:9]) < 1:
        raise SolverFileError(f"'{path}' has format version {version[:40]!r}, expected a whole number of at least 1.")
    if int(version[:9]) > FORMAT_VERSION:
        raise SolverFileError(
            f"'{path}' has format version {version[:40]}, this installation reads up to {FORMAT_VERSION}. Upgrade "
            "with `pip install -U diffusers-searched-solver`."
        )


def _step_counts(path: Path, names: Collection[str]) -> list[int]:
    counts = set()
    for name in names:
        count, _, table = name.partition(".")
        if table not in _TABLES or not count.isascii() or not count.isdecimal() or str(int(count[:9])) != count:
            raise SolverFileError(
                f"'{path}': unexpected tensor {reprlib.repr(name)}, expected a step count and a table, such as "
                f"'8.timesteps' ({', '.join(_TABLES)})."
            )
        if not 1 <= int(count) <= MAX_STEPS:
            raise SolverFileError(f"'{path}': tensor '{name}' is of {count} steps, expected 1 to {MAX_STEPS}.")
        counts.add(int(count))
    if not counts:
        raise SolverFileError(f"'{path}' holds no solver. Search one with `accelerate launch search/run.py`.")
    return sorted(counts)


def _read_tables(path: Path, file, n: int) -> dict[str, np.ndarray]:
    """The tables of n steps; nothing is read of a tensor that is not what it must be."""
    shapes = dict(zip(_TABLES, ([n], [n + 1], [n + 1], [n, n]), strict=True))
    for table, shape in shapes.items():
        name = f"{n}.{table}"
        if name not in file.keys():
            raise SolverFileError(f"'{path}': tensor '{name}' is missing. Download the file again.")
        found = file.get_slice(name)
        if found.get_dtype() != "F64":
            raise SolverFileError(
                f"'{path}': tensor '{name}' has dtype {found.get_dtype()}, expected F64. Save it again in float64."
            )
        if found.get_shape() != shape:
            raise SolverFileError(
                f"'{path}': tensor '{name}' has shape {reprlib.repr(found.get_shape())}, expected {shape}. Download "
                "the file again."
            )
    return {table: file.get_tensor(f"{n}.{table}") for table in _TABLES}


def _read_header(path: Path, metadata: Mapping[str, str]) -> tuple[str, bool, NoiseProcess, str]:
    choices = {"frame": ("data", "velocity"), "row_sums": tuple(_ROW_SUMS), "prediction_type": PREDICTION_TYPES}
    for key, allowed in choices.items():
        if metadata.get(key) not in allowed:
            raise SolverFileError(
                f"'{path}': metadata `{key}` is {reprlib.repr(metadata.get(key))}, expected one of "
                f"{', '.join(allowed)}."
            )
    try:
        process = process_from_json(metadata.get("process", ""))
    except (ValueError, TypeError, RecursionError) as error:
        raise SolverFileError(
            f"'{path}': metadata `process` cannot be read ({error}). Save the file again from a scheduler whose "
            "config describes its noise process."
        ) from error
    return metadata["frame"], _ROW_SUMS[metadata["row_sums"]], process, metadata["prediction_type"]


def _solver(path: Path, tables: Mapping[str, np.ndarray], n: int, frame: str, consistent: bool) -> SearchedSolver:
    try:
        return SearchedSolver(**tables, frame=frame, consistent=consistent)
    except ValueError as error:
        raise SolverFileError(
            f"'{path}': the tables of {n} steps ('{n}.*') are not a solver. {error} Download the file again or search "
            "anew."
        ) from error
