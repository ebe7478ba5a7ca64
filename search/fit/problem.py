"""What a search fits a solver to: noises, the ends that a teacher reaches from them, and what evaluations cost."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState

from diffusers_searched_solver import (
    NoiseProcess,
    SearchedSolver,
    SearchedSolverScheduler,
    time_grid,
)
from diffusers_searched_solver.teacher import teacher_solver

from ..launch.processes import agree, gather, total
from ..pipeline.noises import Noises
from ..pipeline.rollout import endpoint_errors, rollout, root_mean_square, sample_errors
from ..pipeline.rounding import rounding_error
from ..teacher.batches import TEACHER_SHARE, Teacher
from ..teacher.splits import CONFIRMING_SEEDS, JUDGING_SEEDS, TRAIN_SEEDS, make_noises
from .demands import HEAVY, Demands, usual_demands
from .parameters import FRAME
from .screening import HARD, Screening, screening_evaluations


logger = logging.getLogger(__name__)

MOST_TEACHER_STEPS = 1024
# The noises on which the teacher is tried.
TEACHER_NOISES = 4
# What halving the teacher's steps multiplies its error with, less one: that is in the difference. Its method is of
# third order, but networks are not smooth enough for that: from 24 to 48 steps errors fall by 1.7 to 7 times.
HALVED = 2**2 - 1


@dataclass(frozen=True, kw_only=True)
class Problem(Demands):
    """
    What a solver is fitted to.

    Args:
        process: Of the pipeline.
        rounding (`float`): Of its predictions.
        train, judging (`Noises`): To fit, and to judge what was fitted.
        confirming (`Noises`): To ask once, when all is done.
        teacher_error (`float`): Of the run whose ends are the goal, as far as runs of half its steps show.
        setup_calls (`int`): What all processes have spent until here, but for these noises.
    """

    process: NoiseProcess
    rounding: float
    train: Noises
    judging: Noises
    confirming: Noises
    teacher_error: float
    setup_calls: int

    @property
    def calls(self) -> int:
        """Network calls of all processes for the teacher and for trying it."""
        return self.setup_calls + sum(noises.calls for noises in self._splits)

    @property
    def charged(self) -> int:
        """The same of the noises that were asked for."""
        return self.setup_calls + sum(noises.calls_of_asked for noises in self._splits)

    @property
    def _splits(self) -> tuple[Noises, Noises, Noises]:
        return self.train, self.judging, self.confirming

    def anew(self) -> "Problem":
        """
        The same for one more step count, which is charged with the noises that it asks for, whether or not they are
        there already: so what it finds does not depend on which step counts were searched before.
        """
        train, judging, confirming = (noises.anew() for noises in self._splits)
        return replace(self, train=train, judging=judging, confirming=confirming)

    def fingerprint(self) -> str:
        """A hash of the first noises and the teacher's ends of all processes."""
        batches = self.train.between(0, TEACHER_NOISES)
        digests = [_digest(batch.field.noise, batch.target) for batch in batches]
        return hashlib.sha256("".join(gather(batches, digests)).encode()).hexdigest()

    def close(self):
        """End the pipeline's calls."""
        for noises in self._splits:
            noises.close()


def search_problem(teacher: Teacher, conditions: Sequence[Mapping], step_counts: Sequence[int], seed: int) -> Problem:
    """
    Noises to fit and to judge, with the ends of a teacher that is good enough for solvers of `step_counts` steps.

    Args:
        teacher: To begin with. Its steps are doubled until they are twice the largest step count, and its own error,
            as a run of half the steps shows it, is at most a tenth of the best rival's there.
    """
    pipe, calls = teacher.pipe, teacher.calls
    own = SearchedSolverScheduler.from_config(pipe.scheduler.config)
    before = calls.count

    screening = Screening(teacher, conditions, seed)
    evenness = screening.evenness()
    # Of those that judge the hard ones come first: on these, what is known races.
    spacings = {TRAIN_SEEDS: HARD // 2, JUDGING_SEEDS: 1} if evenness < HEAVY else {}
    orders = {split: screening.stratified(split, spacing) for split, spacing in spacings.items()}

    def noises(split: int, teacher: Teacher) -> Noises:
        return make_noises(teacher, conditions, seed, split, *orders.get(split, ()))

    found = _good_teacher(teacher, lambda each: noises(TRAIN_SEEDS, each), own.process, max(step_counts))
    train, teacher, error = found
    first = train.between(0, 1)
    rounding = agree(rounding_error(first[0].field) if PartialState().is_main_process else None)
    judging = noises(JUDGING_SEEDS, teacher)
    demands = vars(usual_demands(pipe, conditions, teacher.steps, calls)) | {"evenness": evenness}
    return Problem(
        **demands,
        process=own.process,
        rounding=rounding,
        train=train,
        judging=judging,
        confirming=noises(CONFIRMING_SEEDS, teacher),
        teacher_error=error,
        setup_calls=total(calls.count - before) - train.calls,
    )


def _good_teacher(
    teacher: Teacher, make: Callable[[Teacher], Noises], process: NoiseProcess, most_steps: int
) -> tuple[Noises, Teacher, float]:
    """Noises with the ends of a good teacher, as [`search_problem`] has it, that teacher, and its error."""
    train = make(teacher)
    coarse = _ends(train, teacher_solver(process, teacher.steps // 2))
    goal = TEACHER_SHARE * _best_rival(train, process, most_steps)
    while (
        (error := _distance(train, coarse) / HALVED) > goal or teacher.steps < 2 * most_steps
    ) and teacher.steps < MOST_TEACHER_STEPS:
        coarse = [batch.target for batch in train.between(0, TEACHER_NOISES)]
        train.close()
        teacher = replace(teacher, steps=2 * teacher.steps)
        train = make(teacher)
        train.between(0, TEACHER_NOISES)
    if error > goal:
        logger.warning(
            f"The teacher's own error is {error:.3g} at {teacher.steps} steps, more than a tenth of the "
            f"{goal / TEACHER_SHARE:.3g} of a usual solver of {most_steps} steps: the solver may be fitted to its "
            "mistakes. Search for fewer steps, or at a lower guidance scale."
        )
    return train, teacher, error


def setup_evaluations(teacher_steps: int, most_steps: int) -> int:
    """Evaluations of one sample for screening, and until the teacher is good enough on a few noises."""
    return screening_evaluations() + int(TEACHER_NOISES * (1.5 * teacher_steps + 3 * most_steps))


def _ends(train: Noises, solver: SearchedSolver) -> list[torch.Tensor]:
    return [rollout(batch.field, solver) for batch in train.between(0, TEACHER_NOISES)]


def _distance(train: Noises, ends: Sequence[torch.Tensor]) -> float:
    batches = train.between(0, TEACHER_NOISES)
    errors = [sample_errors(end, batch.target) for end, batch in zip(ends, batches, strict=True)]
    return root_mean_square(torch.cat(gather(batches, errors)))


def _best_rival(train: Noises, process: NoiseProcess, num_steps: int) -> float:
    """The error of a good solver that needs no search: the best of three usual tables."""
    flow = process.kind == "flow_matching"
    grids = ((1.0, 1.0), (2.0, 1.0), (3.0, 1.0)) if flow else ((0.35, 0.8), (0.7, 0.9), (1.0, 1.0))
    tables = [
        SearchedSolver.adams_bashforth(*time_grid(process, num_steps, shift, start), FRAME, order=2 if flow else 3)
        for shift, start in grids
    ]
    batches = train.between(0, TEACHER_NOISES)
    return min(root_mean_square(endpoint_errors(batches, table)) for table in tables)


def _digest(*tensors: torch.Tensor) -> str:
    content = b"".join(tensor.cpu().float().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()
