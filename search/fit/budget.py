"""What a search may spend, and what its stages take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..known.baselines import known_tables
from ..known.race import HARD_RUNGS, RUNGS, race_evaluations
from ..pipeline.field import HELD_STATES, MOST_HELD
from ..pipeline.noises import portion_end
from ..pipeline.rollout import MOST_ELEMENTS
from .demands import HEAVY_CALLS, HEAVY_FACTOR, HEAVY_JUDGES, Demands


# Network calls of a search, and how many more for the cubed number of steps: a Jacobian has about half as many columns
# as there are steps squared, and each is a part of a run.
BASE_CALLS, CALLS_PER_CUBED_STEP = 8_500, 17
# Noises of the stages, each at the end of a portion: node times, everything at first, everything from then on. Twice
# as many, and more calls, where a few noises are much harder than others, and for every guidance scale.
TIMES_NOISES, FIRST_NOISES, LATER_NOISES = 4, 8, 16
# Noises of all iterations over everything where a few noises are much harder than others: so many that they are worth
# as many even ones, within these. Of the most uneven network of galaxies, what one Jacobian says of 40 noises depends
# on which these are; where 32 will do, two rounds of as many lead farther than one of 64.
EFFECTIVE_NOISES, HEAVY_NOISES = 7, (32, 64)
# Noises that judge at least, and at most; between them, those whose teacher and some runs of solvers take a share of
# the calls: with more calls there are more solvers to choose from, and a few noises that see no difference between
# the best of them would keep the first (on an exact mixture, six times the calls had ended where it began).
JUDGES, MOST_JUDGES = 16, 64
JUDGING_SHARE, JUDGED = 0.2, 6
# Where a few noises are much harder than others: noises, for as many times the usual calls, that are asked only when
# all is done; and how far solvers that are asked lie on the way from where the best began to where it ended.
CONFIRMING, WAYS = 32, (1.0, 0.7, 0.4)

# Shares of what an iteration has fitted that are judged where a few noises are much harder than others: what some ask
# for, others ask for in part. On networks of galaxies half of a last iteration was better by up to 5 % where all of it
# was no better than where it began.
SHARES = (1.0, 0.5)

# Residuals that there are at least for the squared number of steps, about as many as numbers of a table.
RESIDUALS = 4
# Trials that an iteration makes at least, and more where there are calls for them.
LEAST_TRIALS = 3


@dataclass(frozen=True)
class Budget:
    """
    How many noises the stages of one search have, and what they cost in evaluations of one sample.

    Args:
        demands, num_steps: Of what is fitted, and N.
        max_calls (`float`): Network calls of all.
    """

    demands: Demands
    num_steps: int
    max_calls: float

    def many(self, noises: int) -> int:
        """As many times the usual number of noises as this problem needs, at the end of a portion."""
        return portion_end(self.demands.factor * noises)

    def enough(self, noises: int) -> int:
        """As many, or as many as have a few residuals for every number of a table: states of toys are so small."""
        return max(self.many(noises), portion_end(math.ceil(RESIDUALS * self.num_steps**2 / self.demands.elements)))

    @property
    def first_noises(self) -> int:
        """Of the first iterations over everything."""
        return self._heavy_noises if self.demands.heavy else self.enough(FIRST_NOISES)

    @property
    def later_noises(self) -> int:
        """Of those that follow."""
        return self._heavy_noises if self.demands.heavy else self.enough(LATER_NOISES)

    @property
    def _heavy_noises(self) -> int:
        return portion_end(
            self.demands.num_variants * int(np.clip(EFFECTIVE_NOISES / self.demands.evenness, *HEAVY_NOISES))
        )

    @property
    def judges(self) -> int:
        """Noises that judge: as many as a share of the calls pays for, within what is useful."""
        each = (self.demands.teacher_steps + JUDGED * self.num_steps) * self.demands.calls_per_evaluation
        least, most = self.demands.judges_factor * JUDGES, self.demands.judges_factor * MOST_JUDGES
        return portion_end(int(np.clip(JUDGING_SHARE * self.max_calls / each, least, most)))

    @property
    def rungs(self) -> Sequence[tuple[int, float]]:
        """Of the race."""
        return HARD_RUNGS if self.demands.heavy else RUNGS

    @property
    def shares(self) -> Sequence[float]:
        """Of an iteration, that are judged."""
        return SHARES if self.demands.heavy else (1.0,)

    def iteration(self, noises: int, times_only: bool = False) -> int:
        """An iteration that makes the least trials, and judging it: a column is a run from where it differs on."""
        n = self.num_steps
        columns = n * (n + 1) // 2
        if not times_only:
            columns += n * (n**2 - 1) // 6 + (columns if self.demands.offsets else 0)
        judged = 0 if times_only else self.judges
        return noises * (columns + 2 * n) + len(self.shares) * judged * n + LEAST_TRIALS * self.trial(noises)

    def trial(self, noises: int) -> int:
        """A step that is tried."""
        return self.num_steps * noises

    def check(self, num_tables: int):
        """
        Refuse to begin what would not come to one iteration.

        Raises:
            ValueError: If the calls do not suffice.
        """
        first, teacher_steps = self.enough(FIRST_NOISES), self.demands.teacher_steps
        racing = sum(num_tables * share * self.many(n) for n, share in self.rungs) * self.num_steps / 2
        evaluations = teacher_steps * (first + self.judges) + racing + 4 * self.judges * self.num_steps
        least = int((evaluations + self.iteration(first)) * self.demands.calls_per_evaluation)
        if self.max_calls < least:
            raise ValueError(
                f"`max_calls` is {self.max_calls:,}, expected at least {least:,} for {self.num_steps} steps: the "
                f"teacher's {teacher_steps} steps from {first + self.judges} noises, the race of all that is known "
                "and one iteration. Allow more, or search for fewer steps."
            )


def check_calls(demands: Demands, step_counts: Sequence[int], max_calls: int | None):
    """
    Refuse a search in which a step count would not come to one iteration.

    Raises:
        ValueError: If the calls do not suffice.
    """
    for num_steps in step_counts:
        budget = Budget(demands, num_steps, allowed_calls(demands, num_steps, max_calls))
        budget.check(len(known_tables(demands.config, num_steps)))


def allowed_calls(demands: Demands, num_steps: int, max_calls: int | None) -> int:
    """Network calls that a search has: those that it is given, or else by default."""
    return default_calls(demands, num_steps) if max_calls is None else max_calls


def default_calls(demands: Demands, num_steps: int) -> int:
    """Network calls that a search has unless it is told otherwise."""
    return int(demands.num_variants * (HEAVY_CALLS if demands.heavy else 1) * usual_calls(num_steps))


def usual_calls(num_steps: int) -> int:
    """Network calls at one guidance scale, where no noises are much harder than others."""
    return BASE_CALLS + CALLS_PER_CUBED_STEP * num_steps**3


def shared_evaluations(teacher_steps: int) -> int:
    """Evaluations of one sample by the teacher of the first step count; the noises are there for the others then."""
    return teacher_steps * (FIRST_NOISES + LATER_NOISES)


def judging_evaluations(config: Mapping, num_steps: int) -> int:
    """Evaluations of one sample by the race of all that is known, and by judging the best of it."""
    return race_evaluations(len(known_tables(config, num_steps)), num_steps) + 4 * JUDGES * num_steps


def search_bytes(demands: Demands, step_counts: Sequence[int], batch_size: int, num_processes: int) -> float:
    """
    What a search holds in one process beyond a run of the pipeline, at most: derivatives, the teacher's ends, calls
    that are suspended, and a run with all its states and predictions.
    """
    iterated = HEAVY_NOISES[1] if demands.heavy else LATER_NOISES
    judging = HEAVY_FACTOR * (HEAVY_JUDGES * JUDGES + CONFIRMING) if demands.heavy else JUDGES
    iterated, noises = (math.ceil(demands.num_variants * n / num_processes) for n in (iterated, iterated + judging))
    state, most = 4.0 * demands.elements, max(step_counts)
    derivatives = 4.0 * min(demands.elements, MOST_ELEMENTS) * iterated * (most * (most + 1) // 2 + 2 * most)
    suspended = min(HELD_STATES * state * noises, max(MOST_HELD, HELD_STATES * state * batch_size))
    return derivatives + state * noises + suspended + 2 * most * state * batch_size
