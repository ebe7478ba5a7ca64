"""Noises: the samples of one split of a search, made with their teacher's ends when they are first asked for."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..launch.processes import total
from .rollout import Batch


# Noises are made in portions that end at these numbers, and then at every GROWTH more.
PORTIONS = 1, 2, 4, 8, 16
GROWTH = 8


@dataclass(frozen=True)
class Portion:
    """
    Noises up to a number.

    Args:
        end (`int`): This number.
        batches: Those of this process.
        dealt (`int`): Calls of the pipeline that they were dealt out in, of all processes.
        calls (`int`): What all processes have spent on them.
    """

    end: int
    batches: list[Batch]
    dealt: int
    calls: int


class Noises:
    """
    Samples with the teacher's end points, as many as are asked for.

    Where a few noises are hard for every solver and carry most of the squared error, a sample of sixteen has one of
    them or none. So noises may come in strata, and weigh as much as there are of their like, whatever share of the
    sample they are.

    Args:
        make: Makes this process's batches of the noises from a number to another, given how many calls have been dealt
            out to processes before; also returns how many these are.
        count_calls: Network calls of this process so far.
        seeds: Of all noises that there may be, by number, in such an order that any portion has some of each stratum.
        strata: By seed, which share of all noises are of its stratum; one for those that are not in it.

    Attributes:
        asked (`int`): How many were asked for, since [`anew`] if they are of it.
    """

    def __init__(
        self,
        make: Callable[[int, int, int], tuple[list[Batch], int]],
        count_calls: Callable[[], int],
        seeds: Callable[[int], int],
        strata: Mapping[int, float],
    ):
        self._make, self._count_calls, self._seeds, self._strata = make, count_calls, seeds, strata
        self._portions: list[Portion] = []
        self.asked = 0

    def anew(self) -> "Noises":
        """The same noises, of which none have been asked for."""
        other = copy.copy(self)  # the portions are shared
        other.asked = 0
        return other

    def between(self, start: int, stop: int) -> list[Batch]:
        """This process's batches of the noises from one end of a portion (or 0) to another."""
        while self.made < stop:
            self._grow()
        ends = [0, *(portion.end for portion in self._portions)]
        if start not in ends or stop not in ends:
            raise ValueError(f"There is no portion of noises from {start} to {stop}, only of those up to {ends}.")
        self.asked = max(self.asked, stop)
        return [batch for portion in self._portions if start < portion.end <= stop for batch in portion.batches]

    def weights(self, start: int, stop: int) -> "Weights":
        """What the noises from one number to another weigh."""
        return Weights([self._seeds(number) for number in range(start, stop)], self._strata)

    @property
    def made(self) -> int:
        """How many there are."""
        return self._portions[-1].end if self._portions else 0

    @property
    def calls(self) -> int:
        """What all processes have spent on all that there are."""
        return sum(portion.calls for portion in self._portions)

    @property
    def calls_of_asked(self) -> int:
        """What all processes have spent on those that were asked for."""
        return sum(portion.calls for portion in self._portions if portion.end <= self.asked)

    def _grow(self):
        before, end = self._count_calls(), portion_end(self.made + 1)
        batches, dealt = self._make(self.made, end, sum(portion.dealt for portion in self._portions))
        self._portions.append(Portion(end, batches, dealt, total(self._count_calls() - before)))

    def close(self):
        """End the pipeline's calls."""
        for portion in self._portions:
            for batch in portion.batches:
                batch.field.close()


class Weights:
    """
    What each of some noises weighs in a mean: the share of its stratum among all over that among these.

    Args:
        seeds: Of these noises.
        strata: As in `Noises`.
    """

    def __init__(self, seeds: Sequence[int], strata: Mapping[int, float]):
        shares = {seed: strata.get(seed, 1.0) for seed in seeds}
        found = list(shares.values())
        self._weights = {seed: share * len(found) / found.count(share) for seed, share in shares.items()}

    def of(self, batch: Batch) -> torch.Tensor:
        """The weight of each row of a batch's states; pipelines with guidance may have every sample twice."""
        weights = torch.tensor([self._weights[seed] for seed in batch.field.seeds], dtype=torch.float64, device="cpu")
        return weights.repeat(batch.field.shape[0] // len(weights))


def portion_end(count: int) -> int:
    """The least end of a portion that is not below `count`."""
    ends = itertools.chain(PORTIONS, itertools.count(PORTIONS[-1] + GROWTH, GROWTH))
    return next(end for end in ends if end >= count)
