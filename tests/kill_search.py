"""
Kill a search at random moments and go on with it: it has to end as if nothing had happened.

    python tests/kill_search.py --kills 50 --seed 0

kills each of ten searches five times, in about five minutes. Further options are those of `search/run.py`.
"""

import argparse
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from diffusers_searched_solver import load_solver_file


RUN = Path(__file__).parent.parent / "search" / "run.py"
PIPELINE = RUN.parent.parent / "examples" / "digits-sit"
OPTIONS = "--num-steps 3 --batch-size 2 --teacher-steps 8 --num-eval-samples 2".split()
# What a report may say of one search and not of another that found the same.
CIRCUMSTANCES = ("command", "processes", "seconds", "seconds_per_image", "peak_memory_over_inference")
PATIENCE = 120

# Searches are forks of a process that has everything imported, so that they begin at once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["search.run"])


class Search:
    """
    `search/run.py` as one process, or as several that find each other as those of `accelerate launch` do.

    Args:
        folder (`Path`): For the output, the teacher's cache and what the search prints.
        options: Beside `OPTIONS`, of which they may change some.
        num_processes (`int`): How many.
        prepare (*optional*): Called in each process before everything else.
    """

    def __init__(
        self,
        folder: Path,
        *options: object,
        num_processes: int = 1,
        prepare: Callable[[], object] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self._log = folder / "out", folder / "log"
        self._log.write_bytes(b"")
        arguments = ["--pipeline", PIPELINE, *OPTIONS, "--output-dir", self.out, "--cache-dir", folder / "cache"]
        command = [str(argument) for argument in (RUN, *arguments, *options)]
        ranks = _ranks(num_processes)
        self.processes = [
            _FORKS.Process(target=_run, args=(command, self._log, rank, prepare), daemon=True) for rank in ranks
        ]
        for process in self.processes:
            process.start()

    @property
    def log(self) -> str:
        """What all processes have printed so far."""
        return self._log.read_text()

    def wait_for(self, words: str) -> "Search":
        """Until it prints them."""
        return self._wait_until(lambda: words in self.log)

    def wait_for_solver(self) -> "Search":
        """Until it has found one."""
        return self._wait_until((self.out / "scheduler_config.json").exists)

    def _wait_until(self, condition: Callable[[], bool]) -> "Search":
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end and self.processes[0].is_alive(), self.log
            time.sleep(0.005)
        return self

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
        """The exit codes of all processes; None for one that has not ended by then."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def kill(self) -> bool:
        """End all processes as `kill -9` does; tells whether one was still at work."""
        for process in self.processes:
            process.kill()
        return -signal.SIGKILL in self.wait()

    def found(self) -> dict:
        """The files of a finished search and what is in them, without what may differ."""
        assert self.wait() == [0] * len(self.processes), self.log
        return {str(path.relative_to(self.out)): _content(path) for path in self.out.rglob("*") if path.is_file()}


def _ranks(num_processes: int) -> list[dict[str, str]]:
    if num_processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def _run(command: list[str], log: Path, environment: dict[str, str], prepare: Callable[[], object] | None):
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _content(path: Path) -> object:
    """Pages tell the reports' circumstances and numbers once more."""
    if path.suffix in (".html", ".md"):
        return None
    return _facts(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def _facts(report: object) -> object:
    if isinstance(report, dict):
        return {key: _facts(value) for key, value in report.items() if key not in CIRCUMSTANCES}
    return [_facts(value) for value in report] if isinstance(report, list) else report


def check_whole(out: Path):
    """Make sure that every file that can be seen is whole."""
    for path in out.rglob("*"):
        if path.is_dir() or path.relative_to(out).parts[0].startswith("."):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            # The last line may be torn.
            [json.loads(line.partition(" ")[2]) for line in path.read_text().split("\n")[:-1]]
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".safetensors":
            load_solver_file(path)
        else:
            assert path.name == "README.md"


def kill_and_go_on(folder: Path, kills: int, moments: random.Random, seconds: float, *options: object) -> dict:
    """
    Kill a search so many times, each time at a moment of the time that an undisturbed one takes.

    Returns:
        `dict`: What it has found in the end.
    """
    while kills:
        search = Search(folder, "--resume", *options)
        search.wait(moments.uniform(0, seconds))
        kills -= search.kill()
        check_whole(search.out)
    return Search(folder, "--resume", *options).found()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args, options = parser.parse_known_args()
    moments, options = random.Random(args.seed), ["--num-steps", 2, 3, *options]
    with tempfile.TemporaryDirectory() as folder:
        Search(Path(folder, "first"), "--dry-run").wait()
        started = time.perf_counter()
        undisturbed = Search(Path(folder, "undisturbed"), *options).found()
        seconds = time.perf_counter() - started
        for k in range(0, args.kills, 5):
            kills = min(5, args.kills - k)
            found = kill_and_go_on(Path(folder, str(k)), kills, moments, seconds, *options)
            if found != undisturbed:
                different = [name for name in undisturbed if found[name] != undisturbed[name]]
                sys.exit(f"Killed {kills} times, a search ended with other {', '.join(different)}.")
            print(f"killed {k + kills} times: no difference", flush=True)


if __name__ == "__main__":
    main()
