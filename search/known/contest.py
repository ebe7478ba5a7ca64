"""Two solvers on the same noises: three numbers that say which is better, and how far sampling could mislead them."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import BeforeValidator


# A number that is null in JSON, which has finite ones only, where it is infinite.
Number = Annotated[float, BeforeValidator(lambda value: np.inf if value is None else value)]
BOOTSTRAP_DRAWS = 2000
# What a ratio may be above one by chance.
LITTLE = 1.25
# Samples that both solvers end exactly on count as equal.
TINY = 1e-12
# What the error of a run that diverges counts as.
HUGE = 1e30


@dataclass(frozen=True)
class Contest:
    """
    A solver's errors over a rival's, on the same noises.

    Errors differ by a hundred times between samples, so no one number tells: a root mean square is that of the few
    worst samples, a mean of ratios that of the many good ones.

    Args:
        ratio (`float`): Of root mean squares.
        geometric_mean (`float`): Of the samples' ratios.
        nearer (`float`): The share of samples that end nearer than the rival's; half of those that end as near.
        worst (`float`): The largest of the samples' ratios.
        ratio_interval, geometric_mean_interval: Their 95 % bootstrap intervals over samples.
    """

    ratio: Number
    geometric_mean: Number
    nearer: float
    worst: Number
    ratio_interval: tuple[Number, Number]
    geometric_mean_interval: tuple[Number, Number]

    @classmethod
    def of(cls, errors: torch.Tensor, rival: torch.Tensor, weights: torch.Tensor | None = None) -> "Contest":
        """
        Args:
            errors, rival (`torch.Tensor`, shape (samples,)): Distances to the teacher's ends.
            weights (`torch.Tensor`, shape (samples,), *optional*): What each sample counts in means.
        """
        squares, rival_squares = (finite(each).square().numpy() + TINY**2 for each in (errors, rival))
        weights = np.ones(len(squares)) if weights is None else weights.cpu().numpy()
        logs, nearer = np.log(squares / rival_squares) / 2, np.sign(rival_squares - squares) / 2 + 0.5
        with np.errstate(all="ignore"):
            drawn = np.sqrt(resampled_means(squares * weights) / resampled_means(rival_squares * weights))
            drawn_logs = resampled_means(logs * weights) / resampled_means(weights)
        return cls(
            ratio=float(np.sqrt((squares * weights).mean() / (rival_squares * weights).mean())),
            geometric_mean=float(np.exp(np.average(logs, weights=weights))),
            nearer=float(np.average(nearer, weights=weights)),
            worst=float(np.exp(logs.max())),
            ratio_interval=interval(drawn),
            geometric_mean_interval=interval(np.exp(drawn_logs)),
        )

    @property
    def is_better(self) -> bool:
        """Whether both means are below one."""
        return self.ratio < 1 and self.geometric_mean < 1

    @property
    def wins(self) -> bool:
        """Whether both are below one beyond sampling."""
        return self.ratio_interval[1] < 1 and self.geometric_mean_interval[1] < 1

    @property
    def is_decided(self) -> bool:
        """Whether it is better, or is not, beyond sampling."""
        return self.wins or self.ratio_interval[0] > 1 or self.geometric_mean_interval[0] > 1

    def is_known_within(self, share: float) -> bool:
        """Whether both intervals are so near to one."""
        ends = (*self.ratio_interval, *self.geometric_mean_interval)
        return all(1 - share <= end <= 1 + share for end in ends)

    @property
    def may_be_better(self) -> bool:
        """
        Whether the geometric mean is below one beyond sampling, and the root mean square above it at most by chance
        and by little: of few samples, one decides it.
        """
        by_samples = self.geometric_mean_interval[1] < 1 and self.ratio_interval[0] < 1
        return self.is_better or by_samples and self.ratio < LITTLE

    @property
    def rank(self) -> float:
        """What solvers are ranked by against one rival, the less the better: the geometric mean of both means."""
        rank = np.sqrt(self.ratio * self.geometric_mean)
        return float(rank) if np.isfinite(rank) else np.inf

    def __str__(self) -> str:
        return (
            f"{self.ratio:.2f} times its error, {self.geometric_mean:.2f} times in the geometric mean of samples, "
            f"nearer on {self.nearer:.0%}, {self.worst:.1f} times at worst"
        )


def finite(errors: torch.Tensor) -> torch.Tensor:
    """Errors in float64 on the CPU, of which those of runs that diverge are huge."""
    return errors.cpu().double().nan_to_num(HUGE, posinf=HUGE).clamp(max=HUGE)


def score(errors: torch.Tensor, weights: torch.Tensor) -> float:
    """
    What solvers are ranked by on the same noises: the geometric mean of the errors' root mean square and geometric
    mean; infinite if an error is not finite. The ratio of two solvers' scores has both of a contest's means in it.
    """
    errors, weights = errors.double(), weights / weights.sum()
    if not torch.isfinite(errors).all():
        return np.inf
    squares, logs = (errors.square() * weights).sum(), ((errors + TINY).log() * weights).sum()
    return float((squares.sqrt() * logs.exp()).sqrt())


def resampled_means(values: np.ndarray) -> np.ndarray:
    """The mean of each bootstrap draw; draw k takes the same samples for every solver."""
    draws = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))
    return values[draws].mean(-1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
