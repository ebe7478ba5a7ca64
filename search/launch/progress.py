"""Progress: what a run says while it goes on, to people and to trackers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from accelerate import PartialState
from tqdm import tqdm

from .processes import quiet


# Of a run, beside one for each number of steps.
TEACHER, MEASURING, IMAGES, DRAWING = "teacher", "measuring", "images", "drawing"
# Where there is no terminal, a line at least so often, in seconds.
LINE_EVERY = 60.0


@dataclass(frozen=True)
class Finding:
    """
    What an iteration of a search has led to; as a string, a line that says so.

    Args:
        num_steps (`int`): Of the solver that is searched.
        stage (`str`): What was done.
        numbers (`dict[str, float]`): What came out, by name.
    """

    num_steps: int
    stage: str
    numbers: Mapping[str, float]

    def __str__(self) -> str:
        numbers = (f"{name} {n:,}" if isinstance(n, int) else f"{name} {n:.4g}" for name, n in self.numbers.items())
        return f"{self.num_steps} steps, {self.stage}: {', '.join(numbers)}"


class Progress:
    """
    A bar that counts network calls and tells when they will be done, lines of what was found, and trackers. Only the
    main process says anything; the bar is seen on terminals alone, log files get a line a minute.

    Args:
        expected (`dict[str, int]`): Network calls of every stage, of all processes, in the order of the stages.
        track: Is told numbers by name and how many came before, as `Accelerator.log`.
    """

    def __init__(self, expected: Mapping[str, int], track: Callable[[dict[str, float], int], object]):
        self._to_come, self._track, self._tracked = dict(expected), track, 0
        self._bar = tqdm(unit=" calls", disable=quiet(), smoothing=0)
        self._stage, self._done, self._total = "", 0, 0
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_):
        self._bar.close()

    def begin(self, stage: str):
        """Say that this stage begins; those before it are finished, whatever was expected of them."""
        while next(iter(self._to_come)) != stage:
            self._to_come.pop(next(iter(self._to_come)))
        calls = self._to_come[stage]
        self.write(f"{stage}: about {calls:,} network calls to come" if calls else stage)
        # Each process has its share of the samples.
        self._stage, self._total = stage, self._done + sum(self._to_come.values()) // PartialState().num_processes
        self._bar.total = self._total
        self._bar.set_description(stage)

    def update(self, calls: int):
        """So many network calls were made by this process."""
        self._done += calls
        self._bar.update(calls)
        if self._bar.disable and time.monotonic() - self._said > LINE_EVERY:
            self.write(self._state())

    def _state(self) -> str:
        elapsed = time.monotonic() - self._begun
        how = "{desc}{n_fmt} of about {total_fmt} network calls of this process, {remaining} to go"
        return tqdm.format_meter(self._done, self._total, elapsed, prefix=f"{self._stage}: ", bar_format=how)

    def write(self, line: str):
        """Say something."""
        self._said = time.monotonic()
        if PartialState().is_main_process:
            self._bar.write(line)

    def found(self, finding: Finding):
        """Say what a search has found so far."""
        self.write(str(finding))
        self.track({f"{finding.num_steps} steps/{name}": number for name, number in finding.numbers.items()})

    def track(self, numbers: Mapping[str, float]):
        """Tell the trackers alone."""
        self._track(dict(numbers), self._tracked)
        self._tracked += 1
