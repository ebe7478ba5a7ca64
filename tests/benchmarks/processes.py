"""
What a second process is worth to a search: `python tests/benchmarks/processes.py`, on two cores and otherwise idle.

Pairs of one search by one process and by two, each with a teacher of its own; prints the seconds, their ratio and
whether the tables have the same bits. About six minutes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from diffusers_searched_solver import load_solver_file
from diffusers_searched_solver.serialization import SOLVER_FILE


ROOT = Path(__file__).parents[2]
PAIRS, NUM_STEPS = 3, 8
# Calls of four noises are dealt out, so that there are as many for each process at every stage.
SEARCH = f"--num-steps {NUM_STEPS} --num-samples 64 --num-eval-samples 8 --guidance-scale 2".split()


def search(processes: int, folder: Path) -> float:
    """Seconds of a search, its teacher included."""
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--num_processes", str(processes)]
    launch += ["--multi_gpu"] * (processes > 1)  # which without an accelerator means processes on the CPU
    where = ["--pipeline", ROOT / "examples" / "digits-dit", "--output-dir", folder, "--cache-dir", folder / "cache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, ROOT / "search" / "run.py", *where, *SEARCH]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    report = json.loads((folder / "report.json").read_text())
    return report["search"]["costs"][str(NUM_STEPS)]["seconds"]


def table_of(folder: Path) -> list:
    solver = load_solver_file(folder / SOLVER_FILE).solvers[NUM_STEPS]
    return [solver.timesteps.tolist(), solver.sigmas.tolist(), solver.coefficients.tolist()]


def main():
    ratios = []
    for _ in range(PAIRS):
        with tempfile.TemporaryDirectory() as name:
            one, two = (Path(name, kind) for kind in ("one", "two"))
            seconds = search(1, one), search(2, two)
            same = table_of(one) == table_of(two)
        ratios.append(seconds[0] / seconds[1])
        print(f"{seconds[0]:.1f} s, {seconds[1]:.1f} s: {ratios[-1]:.2f} times faster, same bits: {same}", flush=True)
    print(f"median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
