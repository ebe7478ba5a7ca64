"""
Feed broken solver files and configs to the loader: `python tests/fuzz_solver_file.py --cases 20000 --seed 0`.

Each case must end in a scheduler that samples finite numbers, or in an error that `from_pretrained` promises, within a
second of processor time and 200 MB, without running, importing or writing anything. The first that does not ends the
run with its number and the folder with its files.
"""

import argparse
import contextlib
import faulthandler
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import diffusers
import torch
from mutations import CONFIG, MUTATIONS, mutate_place, write_good_folder

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.serialization import SOLVER_FILE


SECONDS, MEGABYTES, MESSAGE_LENGTH = 1.0, 200, 3000
# Of wall-clock time, after which Python prints where it hangs and ends.
PATIENCE = 60


class Watch:
    """Lists what loading has no need to do, by Python's audit events."""

    RUNNING = ("exec", "import", "pickle.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "ctypes.")
    WRITING = (
        "socket.",
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.chmod",
        "os.link",
        "os.symlink",
        "shutil.",
    )

    def __init__(self):
        self.events: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.events is None:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event.startswith((*self.RUNNING, *self.WRITING)):
            self.events.append(f"{event}{arguments}"[:300])

    @contextlib.contextmanager
    def __call__(self):
        self.events = []
        try:
            yield self.events
        finally:
            self.events = None


def load_and_run(folder: Path):
    """Load as a user would and sample with noise and outputs between -1 and 1."""
    scheduler = SearchedSolverScheduler.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for num_steps in scheduler.solver_file.step_counts if scheduler.solver_file else [2]:
        scheduler.set_timesteps(num_steps)
        sample = 2 * torch.rand(1, 8, generator=generator) - 1
        for timestep in scheduler.timesteps:
            assert torch.isfinite(timestep), f"the network is called at {timestep}"
            output = 2 * torch.rand(1, 8, generator=generator) - 1
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        assert torch.isfinite(sample.half()).all(), f"the image of {num_steps} steps is {sample}"


def run_case(folder: Path, watch: Watch) -> str:
    """
    The outcome of one case.

    Raises:
        AssertionError: If it is none of those allowed.
    """
    forget_peak()
    started, memory = time.process_time(), peak_megabytes()
    with watch() as events:
        try:
            load_and_run(folder)
            outcome = "runs"
        except (ValueError, OSError) as error:
            outcome, message = type(error).__name__, str(error)
            assert len(message) < MESSAGE_LENGTH, f"the message has {len(message)} characters"
            assert message.replace("\n", "").isprintable(), f"control characters in {message!r}"
    assert not events, f"loading did {events[0]}"
    seconds, megabytes = time.process_time() - started, peak_megabytes() - memory
    assert megabytes < MEGABYTES, f"{megabytes:.0f} MB"
    assert seconds < SECONDS, f"{seconds:.1f} s"
    return outcome


def peak_megabytes() -> float:
    """The most memory that this process has held at once since `forget_peak`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def fuzz(cases: int, seed: int, workspace: Path) -> dict[str, Counter]:
    """
    How often each kind of mutation had each outcome.

    Raises:
        AssertionError: At the first case with an outcome that is not allowed.
    """
    good, folder, watch, outcomes = workspace / "good", workspace / "case", Watch(), defaultdict(Counter)
    write_good_folder(good, random.Random(seed))
    # What is imported on first use is imported now; diffusers imports the scheduler of its own that a config names.
    load_and_run(good)
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            getattr(diffusers, name)
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        if case % 50 == 0:
            shutil.rmtree(good)
            write_good_folder(good, rng)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        kind = rng.choice([*MUTATIONS, *MUTATIONS, "place"])
        if kind == "place":
            mutate_place(folder / rng.choice([CONFIG, SOLVER_FILE]), rng)
        else:
            name, mutate = MUTATIONS[kind]
            (folder / name).write_bytes(mutate((folder / name).read_bytes(), rng))
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            outcomes[kind][run_case(folder, watch)] += 1
        except Exception as error:
            raise AssertionError(f"Case {case} ({kind}), files in '{folder}': {error!r}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # What asks for gigabytes is to fail at that, and not to take the machine along.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    started, workspace = time.monotonic(), Path(tempfile.mkdtemp())
    outcomes = fuzz(arguments.cases, arguments.seed, workspace)
    shutil.rmtree(workspace)
    for kind in sorted(outcomes):
        print(f"{kind:9}", ", ".join(f"{count} {outcome}" for outcome, count in outcomes[kind].most_common()))
    print(f"{arguments.cases} cases in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
