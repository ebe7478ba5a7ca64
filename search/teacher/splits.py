"""The splits of a search's noises: to fit, judge, tune, measure and confirm. None has a sample of another."""

from collections.abc import Mapping, Sequence

from ..pipeline.noises import Noises
from ..pipeline.rollout import Batch
from .batches import Teacher, count_batches


# Where each split's seeds begin. `check_solver` takes those from 9,000,000 on.
SPLITS = TRAIN_SEEDS, JUDGING_SEEDS, TUNING_SEEDS, EVALUATION_SEEDS, CONFIRMING_SEEDS = tuple(
    k * 10**6 for k in range(5)
)
MOST_NOISES = 4096


def split_seeds(seed: int, split: int, count: int) -> list[int]:
    """Seeds of one split's samples."""
    return [seed * 10**7 + split + k for k in range(count)]


def make_noises(
    teacher: Teacher,
    conditions: Sequence[Mapping],
    seed: int,
    split: int,
    order: Sequence[int] = (),
    strata: Mapping[int, float] = {},  # noqa: B006
) -> Noises:
    """
    The noises of a split.

    Args:
        order: Seeds that come first; the others of the split follow.
        strata: As in `Noises`.
    """
    seeds = [*order, *split_seeds(seed, split, MOST_NOISES)[len(order) :]]

    def make(start: int, stop: int, first: int) -> tuple[list[Batch], int]:
        of_noises = turned(conditions, seeds[start:stop], seed, split)
        count = count_batches(of_noises, stop - start, teacher.batch_size)
        return teacher.batches(of_noises, seeds[start:stop], first), count

    return Noises(make, lambda: teacher.calls.count, seeds.__getitem__, strata)


def turned(conditions: Sequence[Mapping], seeds: Sequence[int], seed: int, split: int) -> list[Mapping]:
    """The condition of each noise: they are used in turn, whatever order the noises come in."""
    first = split_seeds(seed, split, 1)[0]
    return [conditions[(each - first) % len(conditions)] for each in seeds]
