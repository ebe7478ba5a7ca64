"""What a search fits a solver to: noises, the ends that a teacher reaches from them, and what evaluations cost."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import (
    NoiseProcess,
    SearchedSolver,
    SearchedSolverScheduler,
    solver_from_scheduler,
    time_grid,
)
from diffusers_searched_solver.check import teacher_solver
from diffusers_searched_solver.rivals import diffusers_schedulers

from ..known.contest import TINY, finite
from ..known.race import FirstPredictions
from ..launch.processes import agree, everyone, gather, share, total
from ..pipeline.conditions import one_of_each, variant_of
from ..pipeline.field import NetworkCalls, PipelineField
from ..pipeline.noises import Noises
from ..pipeline.rollout import endpoint_errors, rollout, root_mean_square, sample_errors
from ..pipeline.rounding import rounding_error
from ..teacher.batches import TEACHER_SHARE, Samples, Teacher, in_parts, open_field, pipeline_calls
from ..teacher.splits import CONFIRMING_SEEDS, JUDGING_SEEDS, TRAIN_SEEDS, make_noises, split_seeds, turned
from .parameters import FRAME


logger = logging.getLogger(__name__)

MOST_TEACHER_STEPS = 1024
# The noises on which the teacher is tried.
TEACHER_NOISES = 4
# Noises that are looked at to see whether a few are much harder than others, and how uneven they may be for as many
# more to be looked at: samples of 32 are between 0.09 and 0.76 on networks of galaxies and 0.63 and 0.89 on those of
# digits, of 64 between 0.06 and 0.52 and 0.68 and 0.86. Heavy are those below HEAVY. Then SCREENED of those to fit
# and of those that judge are screened, of which one in HARD is of the hard ones, and there are more noises and calls,
# and even more noises that judge.
FEW, UNSURE, HEAVY, SCREENED, HARD = 32, 0.8, 0.55, 128, 8
SCREENING_FAMILIES, SCREENING_STEPS = ("UniPC 3", "DPM-Solver++(2M)"), 4
HEAVY_FACTOR, HEAVY_JUDGES, HEAVY_CALLS = 2, 2, 2.5
# What halving the steps of a method of third order multiplies its error with, less one: that is in the difference.
HALVED = 2**3 - 1


@dataclass(frozen=True)
class Problem:
    """
    What a solver is fitted to.

    Args:
        config: Of the pipeline's scheduler.
        process, prediction_type: Of the pipeline.
        rounding (`float`): Of its predictions.
        train, judging (`Noises`): To fit, and to judge what was fitted.
        confirming (`Noises`): To ask once, when all is done.
        evenness (`float`): How many noises of one hardness would be worth as much as one: one if all are of one.
        num_variants (`int`): Guidance scales and sizes that the solver has to serve.
        teacher_steps (`int`): Of the run whose ends are the goal.
        teacher_error (`float`): Its own error, as far as runs of half its steps show.
        elements (`int`): Of a sample's state.
        calls_per_evaluation (`float`): Network calls of one evaluation of one sample, guidance included; the mean over
            guidance scales and sizes.
        setup_calls (`int`): What all processes have spent until here, but for these noises.
    """

    config: Mapping
    process: NoiseProcess
    prediction_type: str
    rounding: float
    train: Noises
    judging: Noises
    confirming: Noises
    evenness: float
    num_variants: int
    teacher_steps: int
    teacher_error: float
    elements: int
    calls_per_evaluation: float
    setup_calls: int

    @property
    def heavy(self) -> bool:
        """Whether a few noises are much harder than others."""
        return self.evenness < HEAVY

    @property
    def offsets(self) -> bool:
        """Whether network times are searched too; where velocities are predicted they are redundant."""
        return self.prediction_type != "flow_prediction"

    @property
    def factor(self) -> int:
        """How many times as many noises as usual a search has."""
        return self.num_variants * (HEAVY_FACTOR if self.heavy else 1)

    @property
    def judges_factor(self) -> int:
        """The same of the noises that judge."""
        return self.factor * (HEAVY_JUDGES if self.heavy else 1)

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
        teacher: To begin with. Its steps are doubled until its own error, as a run of half the steps shows it, is at
            most a tenth of the best rival's at the largest step count.
    """
    pipe, calls = teacher.pipe, teacher.calls
    own = SearchedSolverScheduler.from_config(pipe.scheduler.config)
    before = calls.count

    def disagreements(split: int, start: int, stop: int) -> list[float]:
        seeds = split_seeds(seed, split, stop)[start:]
        return _disagreements(teacher, turned(conditions, seeds, seed, split), seeds)

    def of_their_like(split: int, distances: Sequence[float]) -> np.ndarray:
        seeds = split_seeds(seed, split, len(distances))
        return _of_their_like(distances, [variant_of(each) for each in turned(conditions, seeds, seed, split)])

    def screened(split: int, spacing: int, known: Sequence[float] = ()) -> tuple[list[int], dict[int, float]]:
        distances = of_their_like(split, [*known, *disagreements(split, len(known), SCREENED)])
        return _stratified(split_seeds(seed, split, len(distances)), distances, spacing)

    of_train = disagreements(TRAIN_SEEDS, 0, FEW)
    if _evenness(of_their_like(TRAIN_SEEDS, of_train)) < UNSURE:
        of_train += disagreements(TRAIN_SEEDS, FEW, 2 * FEW)
    evenness = _evenness(of_their_like(TRAIN_SEEDS, of_train))
    heavy = evenness < HEAVY
    train_order = screened(TRAIN_SEEDS, HARD // 2, of_train) if heavy else ()
    # The hard ones come first: on these, what is known races.
    judging_order = screened(JUDGING_SEEDS, 1) if heavy else ()

    def noises(split: int, teacher: Teacher, order: Sequence[int] = (), strata: Mapping[int, float] = {}) -> Noises:  # noqa: B006
        return make_noises(teacher, conditions, seed, split, order, strata)

    found = _good_teacher(teacher, lambda each: noises(TRAIN_SEEDS, each, *train_order), own.process, max(step_counts))
    train, teacher, error = found
    per_evaluation = agree(calls_per_evaluation(pipe, conditions, calls) if PartialState().is_main_process else None)
    first = train.between(0, 1)
    rounding = agree(rounding_error(first[0].field) if PartialState().is_main_process else None)
    elements = agree(first[0].field.shape[1:].numel() if PartialState().is_main_process else None)
    judging = noises(JUDGING_SEEDS, teacher, *judging_order)
    setup = total(calls.count - before) - train.calls
    kind = own.config.prediction_type
    return Problem(
        pipe.scheduler.config,
        own.process,
        kind,
        rounding,
        train,
        judging,
        noises(CONFIRMING_SEEDS, teacher),
        evenness,
        len(one_of_each(conditions)),
        teacher.steps,
        error,
        elements,
        per_evaluation,
        setup,
    )


def _good_teacher(
    teacher: Teacher, make: Callable[[Teacher], Noises], process: NoiseProcess, most_steps: int
) -> tuple[Noises, Teacher, float]:
    """Noises with the ends of a teacher whose own error is small beside a usual solver's, that teacher, its error."""
    train = make(teacher)
    coarse = _ends(train, teacher_solver(process, teacher.steps // 2))
    goal = TEACHER_SHARE * _best_rival(train, process, most_steps)
    while (error := _distance(train, coarse) / HALVED) > goal and teacher.steps < MOST_TEACHER_STEPS:
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
    return int(
        1.5 * FEW * len(SCREENING_FAMILIES) * SCREENING_STEPS + TEACHER_NOISES * (1.5 * teacher_steps + 3 * most_steps)
    )


def _disagreements(teacher: Teacher, conditions: Sequence[Mapping], seeds: Sequence[int]) -> list[float]:
    """
    How far two usual solvers of few steps end from each other, noise by noise: no teacher is needed to see which
    noises are hard. On a network of galaxies, the eighth of the noises on which they disagree most carries 84 to 93 %
    of the squared error of other solvers.
    """
    config = teacher.pipe.scheduler.config
    families = diffusers_schedulers(config)
    solvers = [
        solver_from_scheduler(next(iter(families[family].values())), SCREENING_STEPS) for family in SCREENING_FAMILIES
    ]
    numbered = pipeline_calls(conditions, seeds, teacher.batch_size)

    def distances(samples: Samples, _) -> list[tuple[int, float]]:
        field = open_field(teacher.pipe, samples, teacher.calls)
        shared = FirstPredictions(field)
        ends = (rollout(field, solver, shared.beginning(solver)) for solver in solvers)
        found = sample_errors(next(ends), next(ends)).tolist()
        field.close()
        # Pipelines with guidance may have every sample twice.
        return list(zip(field.seeds, found, strict=False))

    parts = [part for samples in share(numbered) for part in in_parts(teacher.pipe, distances, samples)]
    by_seed = dict(everyone([pair for part in parts for pair in part]))
    return [by_seed[each] for each in seeds]


def _of_their_like(distances: Sequence[float], variants: Sequence[tuple]) -> np.ndarray:
    """
    Distances over what is usual of their guidance scale and size: that all are farther at a higher scale makes no
    noise harder than others.
    """
    shares = finite(torch.tensor(distances, device="cpu")).numpy()
    for variant in {*variants}:
        of_variant = np.array([each == variant for each in variants])
        shares[of_variant] /= max(np.median(shares[of_variant]), TINY)
    return shares


def _evenness(distances: Sequence[float]) -> float:
    """(sum of squares)^2 / (n * sum of their squares): one of n equal ones, 1 / n if one has all."""
    distances = finite(torch.tensor(distances, device="cpu"))
    squares = np.square((distances / max(float(distances.max()), TINY)).numpy())
    spread = len(squares) * np.square(squares).sum()
    return float(squares.sum() ** 2 / spread) if spread else 1.0


def _stratified(seeds: Sequence[int], distances: Sequence[float], spacing: int) -> tuple[list[int], dict[int, float]]:
    """The seeds with a hard one in every `spacing` at first, and by seed the share of all that are of its stratum."""
    hardest = {*np.argsort(distances)[::-1][: len(seeds) // HARD].tolist()}
    hard, easy = ([seed for k, seed in enumerate(seeds) if (k in hardest) == wanted] for wanted in (True, False))
    order = list(easy)
    for k, seed in enumerate(hard):
        order.insert(spacing * k, seed)
    return order, {each: len(of) / len(seeds) for of in (hard, easy) for each in of}


def calls_per_evaluation(pipe: DiffusionPipeline, conditions: Sequence[Mapping], calls: NetworkCalls) -> float:
    """Network calls of one evaluation of one sample, guidance included; the mean over guidance scales and sizes."""
    variants, before = one_of_each(conditions), calls.count
    for condition in variants:
        PipelineField(pipe, condition, [0], calls).close()
    return (calls.count - before) / len(variants)


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
