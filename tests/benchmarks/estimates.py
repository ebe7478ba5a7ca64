"""
What `--dry-run` says that a whole command will take, beside what it then takes: network calls, seconds, memory.

    python tests/benchmarks/estimates.py

Each case runs in processes of its own, from when it is ready to the last picture. Seconds are the machine's: run it
when nothing else does. About ten minutes on two cores. Nothing is written but what is printed.
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock


TESTS = Path(__file__).parent.parent
EXAMPLES = TESTS.parent / "examples"
SIT, DIT = (["--pipeline", str(EXAMPLES / name)] for name in ("digits-sit", "digits-dit"))
CASES = {
    "several guidance scales": [*SIT, "--num-steps", "4", "--guidance-scale", "1", "3"],
    "in the other order": [*SIT, "--num-steps", "4", "--guidance-scale", "3", "1"],
    "two resolutions": [
        *["--pipeline", f"{__file__}:text_to_image", "--prompts", "a", "b", "--num-steps", "3"],
        *["--height", "16", "32", "--width", "16", "32"],
    ],
    "131,072 elements": ["--pipeline", f"{__file__}:large", "--num-steps", "4"],
    "offloaded": [*DIT, "--num-steps", "4", "5", "--guidance-scale", "2", "--offload", "model"],
    "two processes": [*DIT, "--num-steps", "5", "--guidance-scale", "2"],
    "the paper's recipe": [*SIT, "--num-steps", "3", "--fitter", "gradient", "--num-samples", "256"],
}
PROCESSES = {"two processes": 2}
MARK = "MEASURED "


def text_to_image():
    """A tiny pipeline that takes prompts and sizes."""
    sys.path.insert(0, str(TESTS))
    from tiny_text import build_with_text

    return build_with_text("sd3")


def large():
    """A pipeline with large states."""
    sys.path.insert(0, str(TESTS))
    from large import large_pipeline

    return large_pipeline(131_072)


def measured(arguments: list[str]):
    """Run a command in this process, and print what its stages have taken since it was ready to begin."""
    import torch

    from search.launch.progress import Progress
    from search.run import main

    torch.set_num_threads(1)
    counted, begun, update, begin = 0, [], Progress.update, Progress.begin

    def count(progress, calls):
        nonlocal counted
        counted += calls
        update(progress, calls)

    def note(progress, stage):
        begun.append(time.perf_counter())
        begin(progress, stage)

    with mock.patch.object(Progress, "update", count), mock.patch.object(Progress, "begin", note):
        main(arguments)
    seconds = time.perf_counter() - begun[0] if begun else 0.0
    mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(MARK + json.dumps([counted, seconds, mebibytes]), flush=True)


def output_of(name: str, *more: str) -> str:
    """What a case prints."""
    launch = ["accelerate", "launch", "--num_processes", str(PROCESSES.get(name, 1)), "--cpu"]
    with tempfile.TemporaryDirectory() as folder:
        places = ["--output-dir", f"{folder}/out", "--cache-dir", f"{folder}/cache"]
        command = [*launch, __file__, "--one", *CASES[name], *places, *more]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def row(name: str) -> str:
    """A case's line of the table."""
    told = output_of(name, "--dry-run")
    calls, duration = re.search(r"in all: ([\d,]+) network calls, about ([\d.]+ s|[\d.]+ min)", told).groups()
    said = [int(calls.replace(",", "")), float(duration.split()[0]) * (60 if duration.endswith("min") else 1)]
    memory = re.search(r"peak memory: ([\d,]+) MiB", told)
    said.append(int(memory[1].replace(",", "")))
    lines = [line.removeprefix(MARK) for line in output_of(name).splitlines() if line.startswith(MARK)]
    counts, seconds, mebibytes = zip(*map(json.loads, lines), strict=True)
    found = [sum(counts), max(seconds), max(mebibytes)]
    cells = [f"{s:,.0f} / {f:,.0f} = {s / f:.2f}" for s, f in zip(said, found, strict=True)]
    return f"{name:25}" + "".join(f"{cell:>28}" for cell in cells)


def main():
    print(f"{'said / taken':25}{'network calls':>28}{'seconds':>28}{'MiB':>28}")
    for name in CASES:
        print(row(name), flush=True)


if __name__ == "__main__":
    measured(sys.argv[2:]) if sys.argv[1:2] == ["--one"] else main()
