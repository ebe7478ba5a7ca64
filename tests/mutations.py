"""Ways to break the files of a valid scheduler, each a function of the content and a random generator."""

import copy
import json
import os
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, SolverFile, time_grid
from diffusers_searched_solver.serialization import SOLVER_FILE


CONFIG = "scheduler_config.json"
MODELS = [
    {"prediction_type": "flow_prediction", "shift": 3.0},
    {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "trained_betas": None},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample", "trained_betas": [0.01, 0.05, 0.2]},
]
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, 10.0, 1e-30, -1e-300, 5e-324, 1e30, 1e308, -1e308, np.inf, -np.inf, np.nan]
NAMES = [
    *("", "x", "3.alphas", "999999999.alphas", "\x1b[2J", "kind", "__class__", "__init__", "get", "self", "dtype"),
    *("config", "solver", "kwargs", "shift", "trained_betas", "quantization_config", "_deprecated_kwargs", "cls"),
]
VALUES = [
    *(None, True, -1, 0, 1, 2, 3, 256, 10**9, 2**31, 2**53, 2**63, 2**64 - 1, 10**30, 0.5, -0.5, 1e-300, 1e300),
    *("", "1", "x", "../../x", "/etc/passwd", "\0", "\x1b[2J<script>", "linear", "laplace", "squaredcos_cap_v2"),
    *("os.system", "StableDiffusionPipeline", "KarrasVeScheduler", "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"),
    *("flow_matching", "variance_preserving", "velocity", "data", "free", "one", "F64", "F32"),
    *("epsilon", "sample", "v_prediction", "flow_prediction"),
    *([], {}, [[]], [0, 2**62], [2**32, 2**32], [0, 8], [1] * 100, {"a": 1}, [0.1, 0.2, 0.3], [1.0, 0.0], ["x"]),
    "x" * 1_000_000,
]
# JSON that Python's writer would not make; it takes the place of a marker after the writing.
RAW = {
    "<deep list>": "[" * 100_000 + "]" * 100_000,
    "<deep object>": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "<long list>": "[" + "0.5," * 300_000 + "0.5]",
    "<long integer>": "9" * 10_000,
    "<overflow>": "1e999",
    "<nan>": "NaN",
    "<infinity>": "-Infinity",
    "<surrogate>": r'"\ud800"',
    "<second value>": '0, "kind": 1, "dtype": "F64", "beta_start": 2',
    "<not JSON>": "}",
}


def random_solver(rng: random.Random, process, num_steps: int, frame: str) -> SearchedSolver:
    """A valid solver with coefficients off any classical one and network times off its nodes."""
    table = SearchedSolver.adams_bashforth(*time_grid(process, num_steps, rng.uniform(0.5, 3)), frame, 2)
    noise = np.tril(np.random.default_rng(rng.getrandbits(32)).normal(0, 0.1, (num_steps, num_steps)))
    tables = 0.97 * table.timesteps, table.alphas, table.sigmas, table.coefficients + noise
    return SearchedSolver(*tables, frame, consistent=False)


def write_good_folder(folder: Path, rng: random.Random):
    """The files of a valid scheduler with solvers of two step counts."""
    scheduler = SearchedSolverScheduler(**rng.choice(MODELS))
    frame = rng.choice(["velocity", "data"])
    solvers = {n: random_solver(rng, scheduler.process, n, frame) for n in rng.sample([1, 2, 3, 5, 8], 2)}
    file = SolverFile(solvers, scheduler.process, scheduler.config.prediction_type, {"base_model": "me/mine"})
    SearchedSolverScheduler.from_config(scheduler.config, solver=file).save_pretrained(folder)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip a bit, remove, insert, repeat or overwrite some bytes, or claim another length of the header."""
    content, place = bytearray(content), rng.randrange(len(content))
    span, kind = rng.choice([1, 1, 8, 64, 1000]), rng.randrange(6)
    if kind == 0:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[place : place + span]
    elif kind == 2:
        content[place:place] = rng.randbytes(span)
    elif kind == 3:
        content[place:place] = content[place : place + span] * rng.choice([2, 100])
    elif kind == 4:
        content[place : place + span] = rng.choice([b"\0", b"\xff", b"[", b'{"', b"9"]) * span
    else:
        claims = [0, 1, len(content), len(content) - 8, 2**20, 2**31, 2**32, 10**8, 2**63, 2**64 - 1]
        content[:8] = rng.choice(claims).to_bytes(8, "little")
    return bytes(content)


def mutate_json(tree, rng: random.Random) -> str:
    """Remove, rename or replace one to three nodes of a JSON tree."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        nodes = [(container, key) for container in _containers(tree) for key in _keys(container)]
        if not nodes:
            break
        container, key = rng.choice(nodes)
        kind = rng.randrange(4) if isinstance(container, dict) else 3
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[rng.choice(NAMES)] = container.pop(key)
        else:
            container[key] = rng.choice(list(RAW)) if rng.random() < 0.3 else copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(tree)
    for marker, raw in RAW.items():
        text = text.replace(json.dumps(marker), raw)
    return text


def _keys(container):
    return list(container) if isinstance(container, dict) else range(len(container))


def _containers(tree):
    """All dictionaries and lists of a JSON tree."""
    if isinstance(tree, (dict, list)):
        yield tree
        for key in _keys(tree):
            yield from _containers(tree[key])


def split(content: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header: str, data: bytes) -> bytes:
    header = header.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data


def mutate_header(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    return join(mutate_json(header, rng), data)


def mutate_metadata(content: bytes, rng: random.Random) -> bytes:
    """Another text for one entry; that of `process` is JSON in JSON."""
    header, data = split(content)
    metadata = header["__metadata__"]
    key = rng.choice(["process", *metadata])
    metadata[key] = mutate_json(json.loads(metadata[key]), rng) if key == "process" else str(rng.choice(VALUES))
    return join(json.dumps(header), data)


def mutate_tensors(content: bytes, rng: random.Random) -> bytes:
    """Other numbers, another shape, another dtype or another name for one tensor."""
    header, data = split(content)
    metadata = header.pop("__metadata__")
    tensors = {
        name: np.frombuffer(data[slice(*entry["data_offsets"])]).reshape(entry["shape"]).copy()
        for name, entry in header.items()
    }
    name, kind = rng.choice(list(tensors)), rng.randrange(8)
    table = tensors[name]
    if kind <= 2:
        table[tuple(rng.randrange(size) for size in table.shape)] = rng.choice(NUMBERS)
    elif kind == 3:
        with np.errstate(all="ignore"):
            table *= rng.choice(NUMBERS)
    elif kind == 4:
        tensors[name] = table.astype(rng.choice([np.float32, np.float16, np.int64, np.uint8, np.bool_]))
    elif kind == 5:
        empty = np.zeros((0, 2**40))
        tensors[name] = rng.choice([table[..., None], table[None], table[:-1], table[:0], empty, table[::-1]])
    elif kind == 6:
        tensors[rng.choice(["x", "0.alphas", "256.alphas", "٣.alphas", "3.", ".alphas", "1e1.alphas"])] = table
    else:
        table.ravel()[:] = np.random.default_rng(rng.getrandbits(32)).normal(0, 10, table.size)
    return save({key: np.ascontiguousarray(each) for key, each in tensors.items()}, metadata)


def mutate_config(content: bytes, rng: random.Random) -> bytes:
    config = {"_use_default_values": [], "use_flow_sigmas": False, "variance_type": None, **json.loads(content)}
    text = mutate_json(config, rng)
    text = rng.choice([text, text, text, f"[{text}]", text[: rng.randrange(len(text))]])
    return text.encode("utf-8", "surrogatepass")


MUTATIONS = {
    "bytes": (SOLVER_FILE, mutate_bytes),
    "header": (SOLVER_FILE, mutate_header),
    "metadata": (SOLVER_FILE, mutate_metadata),
    "tensors": (SOLVER_FILE, mutate_tensors),
    "config": (CONFIG, mutate_config),
}


def mutate_place(path: Path, rng: random.Random):
    """Something other than a file where a file is expected: a folder, a link, a pipe, nothing."""
    path.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(rng.choice(["/dev/zero", "/nowhere", "..", path.name]))
    elif kind == 2:
        os.mkfifo(path)
