"""Which noises are hard for every solver, seen without a teacher; where a few are, some of them come first."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from diffusers_searched_solver import solver_from_scheduler
from diffusers_searched_solver.rivals import diffusers_schedulers

from ..known.contest import TINY, finite
from ..known.race import FirstPredictions
from ..launch.processes import everyone, share
from ..pipeline.conditions import variant_of
from ..pipeline.rollout import rollout, sample_errors
from ..teacher.batches import Samples, Teacher, in_parts, open_field, pipeline_calls
from ..teacher.splits import TRAIN_SEEDS, split_seeds, turned


# Noises that are looked at to see whether a few are much harder than others, and how uneven they may be for as many
# more to be looked at: samples of 32 are between 0.09 and 0.76 on networks of galaxies and 0.63 and 0.89 on those of
# digits, of 64 between 0.06 and 0.52 and 0.68 and 0.86.
FEW, UNSURE = 32, 0.8
# Noises of a split that are screened where a few are much harder, of which one in HARD is of the hard ones.
SCREENED, HARD = 128, 8
FAMILIES, STEPS = ("UniPC 3", "DPM-Solver++(2M)"), 4


class Screening:
    """
    How hard the noises of each split are, as far as they have been looked at.

    Args:
        teacher: Says how samples are made; it does not run.
        conditions, seed: Of the search.
    """

    def __init__(self, teacher: Teacher, conditions: Sequence[Mapping], seed: int):
        self._teacher, self._conditions, self._seed = teacher, conditions, seed
        self._distances: dict[int, list[float]] = {}

    def evenness(self) -> float:
        """How many noises of one hardness would be worth as much as one of those to fit: one if all are of one."""
        few = evenness(self._shares(TRAIN_SEEDS, FEW))
        return few if few >= UNSURE else evenness(self._shares(TRAIN_SEEDS, 2 * FEW))

    def stratified(self, split: int, spacing: int) -> tuple[list[int], dict[int, float]]:
        """Seeds of a split with a hard one in every `spacing` at first, and strata as `Noises` takes them."""
        return stratified(split_seeds(self._seed, split, SCREENED), self._shares(split, SCREENED), spacing)

    def _shares(self, split: int, count: int) -> np.ndarray:
        seeds, known = split_seeds(self._seed, split, count), self._distances.setdefault(split, [])
        conditions = turned(self._conditions, seeds, self._seed, split)
        known += disagreements(self._teacher, conditions[len(known) :], seeds[len(known) :])
        return of_their_like(known[:count], [variant_of(each) for each in conditions])


def disagreements(teacher: Teacher, conditions: Sequence[Mapping], seeds: Sequence[int]) -> list[float]:
    """
    How far two usual solvers of few steps end from each other, noise by noise: no teacher is needed to see which
    noises are hard. On a network of galaxies, the eighth of the noises on which they disagree most carries 84 to 93 %
    of the squared error of other solvers.
    """
    config = teacher.pipe.scheduler.config
    families = diffusers_schedulers(config)
    solvers = [solver_from_scheduler(next(iter(families[family].values())), STEPS) for family in FAMILIES]
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


def of_their_like(distances: Sequence[float], variants: Sequence[tuple]) -> np.ndarray:
    """
    Distances over what is usual of their guidance scale and size: that all are farther at a higher scale makes no
    noise harder than others.
    """
    shares = finite(torch.tensor(distances, device="cpu")).numpy()
    for variant in {*variants}:
        of_variant = np.array([each == variant for each in variants])
        shares[of_variant] /= max(np.median(shares[of_variant]), TINY)
    return shares


def evenness(distances: Sequence[float]) -> float:
    """(sum of squares)^2 / (n * sum of their squares): one of n equal ones, 1 / n if one has all."""
    distances = finite(torch.tensor(distances, device="cpu"))
    squares = np.square((distances / max(float(distances.max()), TINY)).numpy())
    spread = len(squares) * np.square(squares).sum()
    return float(squares.sum() ** 2 / spread) if spread else 1.0


def stratified(seeds: Sequence[int], distances: Sequence[float], spacing: int) -> tuple[list[int], dict[int, float]]:
    """The seeds with a hard one in every `spacing` at first, and by seed the share of all that are of its stratum."""
    hardest = {*np.argsort(distances)[::-1][: len(seeds) // HARD].tolist()}
    hard, easy = ([seed for k, seed in enumerate(seeds) if (k in hardest) == wanted] for wanted in (True, False))
    order = list(easy)
    for k, seed in enumerate(hard):
        order.insert(spacing * k, seed)
    return order, {each: len(of) / len(seeds) for of in (hard, easy) for each in of}


def screening_evaluations() -> int:
    """Evaluations of one sample by looking at the noises to fit, once or twice as many."""
    return int(1.5 * FEW * len(FAMILIES) * STEPS)
