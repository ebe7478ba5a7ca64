"""What a search may spend, and what its stages take."""

import math
from collections.abc import Mapping, Sequence

from ..known.baselines import known_tables
from ..known.race import race_evaluations
from ..pipeline.field import HELD_STATES, MOST_HELD
from .gauss_newton import MOST_ELEMENTS
from .problem import HEAVY_CALLS, HEAVY_FACTOR, HEAVY_JUDGES, Problem


# Network calls of a search, and how many more for the cubed number of steps: a Jacobian has about half as many columns
# as there are steps squared, and each is a part of a run.
BASE_CALLS, CALLS_PER_CUBED_STEP = 8_500, 17
# Noises of the stages, each at the end of a portion: node times, everything at first, everything from then on. Twice
# as many, and more calls, where a few noises are much harder than others, and for every guidance scale.
TIMES_NOISES, FIRST_NOISES, LATER_NOISES = 4, 8, 16
# Noises of all iterations over everything where a few noises are much harder than others, for as many times the usual
# calls: what one Jacobian says of 32 or fewer depends on which of these they are.
HEAVY_NOISES = 32
# Noises that judge at least, and at most; between them, those whose teacher and some runs of solvers take a share of
# the calls: with more calls there are more solvers to choose from, and a few noises that see no difference between
# the best of them would keep the first (on an exact mixture, six times the calls had ended where it began).
JUDGES, MOST_JUDGES = 16, 64
JUDGING_SHARE, JUDGED = 0.2, 6
# Where a few noises are much harder than others: noises, for as many times the usual calls, that are asked only when
# all is done; and how far solvers that are asked lie on the way from where the best began to where it ended.
CONFIRMING, WAYS = 32, (1.0, 0.7, 0.4)


def default_calls(problem: Problem, num_steps: int) -> int:
    """Network calls that a search has unless it is told otherwise."""
    return int(problem.num_variants * (HEAVY_CALLS if problem.heavy else 1) * usual_calls(num_steps))


def usual_calls(num_steps: int) -> int:
    """Network calls at one guidance scale, where no noises are much harder than others."""
    return BASE_CALLS + CALLS_PER_CUBED_STEP * num_steps**3


def shared_evaluations(teacher_steps: int) -> int:
    """Evaluations of one sample by the teacher of the first step count; the noises are there for the others then."""
    return teacher_steps * (FIRST_NOISES + LATER_NOISES)


def judging_evaluations(config: Mapping, num_steps: int) -> int:
    """Evaluations of one sample by the race of all that is known, and by judging the best of it."""
    return race_evaluations(len(known_tables(config, num_steps)), num_steps) + 4 * JUDGES * num_steps


def search_bytes(
    step_counts: Sequence[int], elements: int, batch_size: int, num_variants: int, num_processes: int, heavy: bool
) -> float:
    """
    What a search holds in one process beyond a run of the pipeline, at most: derivatives, the teacher's ends, calls
    that are suspended, and a run with all its states and predictions.
    """
    iterated = HEAVY_FACTOR * HEAVY_NOISES if heavy else LATER_NOISES
    judging = HEAVY_FACTOR * (HEAVY_JUDGES * JUDGES + CONFIRMING) if heavy else JUDGES
    iterated, noises = (math.ceil(num_variants * n / num_processes) for n in (iterated, iterated + judging))
    state, most = 4.0 * elements, max(step_counts)
    derivatives = 4.0 * min(elements, MOST_ELEMENTS) * iterated * (most * (most + 1) // 2 + 2 * most)
    suspended = min(HELD_STATES * state * noises, max(MOST_HELD, HELD_STATES * state * batch_size))
    return derivatives + state * noises + suspended + 2 * most * state * batch_size
