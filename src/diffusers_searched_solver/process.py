"""Noise processes: how much signal and noise a state holds, and what a network's output says of it."""

import reprlib
from dataclasses import asdict, dataclass
from functools import cached_property
from numbers import Integral, Real

import numpy as np
import torch
from diffusers import DDPMScheduler


# What a quantity weighs the data D and the noise E with, as functions of the state x = alpha * D + sigma * E.
# The two frames of a solver are `sample` ("data") and `flow_prediction` ("velocity").
_DATA_AND_NOISE_WEIGHTS = {
    "sample": lambda alpha, sigma: (1.0, 0.0),
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow_prediction": lambda alpha, sigma: (-1.0, 1.0),
}
PREDICTION_TYPES = tuple(_DATA_AND_NOISE_WEIGHTS)
FRAME_PREDICTIONS = {"data": "sample", "velocity": "flow_prediction"}
# Far beyond every model; files and configs from elsewhere may ask for tables of any length.
MAX_TRAIN_TIMESTEPS = 10_000


def convert_prediction(source: str, target: str, alpha: float, sigma: float) -> tuple[float, float]:
    """
    Weights (u, w) that turn one kind of prediction into another at one noise level.

        q = u * x + w * m        where x = alpha * D + sigma * E,  m = a * D + b * E,  q = c * D + d * E

    Args:
        source (`str`): What m is, one of `PREDICTION_TYPES`.
        target (`str`): What q is, one of `PREDICTION_TYPES`.
        alpha, sigma (`float`): Signal and noise scale of x.

    Returns:
        `tuple[float, float]`: u and w. (0, 1) if source and target are the same.

    Raises:
        ValueError: If m says nothing of q there, as noise does of data in pure noise.
    """
    a, b = _DATA_AND_NOISE_WEIGHTS[source](alpha, sigma)
    c, d = _DATA_AND_NOISE_WEIGHTS[target](alpha, sigma)
    determinant = alpha * b - sigma * a
    if determinant == 0:
        raise ValueError(
            f"At alpha {alpha:g} and sigma {sigma:g} a prediction of kind '{source}' says nothing of '{target}'. Use "
            "nodes with some signal and noise, or a model with another `prediction_type`."
        )
    return (c * b - d * a) / determinant, (alpha * d - sigma * c) / determinant


@dataclass(frozen=True)
class FlowMatching:
    """
    Straight paths from data to noise: alpha = 1 - sigma, timestep = num_train_timesteps * sigma.

    Source: Lipman et al., "Flow Matching for Generative Modeling", arXiv 2210.02747; the scale of `timestep` is
    diffusers'.

    Raises:
        ValueError: If `num_train_timesteps` is not a whole number from 1 to `MAX_TRAIN_TIMESTEPS`.
    """

    num_train_timesteps: int = 1000

    kind = "flow_matching"
    law = "alpha + sigma = 1"

    def __post_init__(self):
        _check_count("num_train_timesteps", self.num_train_timesteps)

    @property
    def max_timestep(self) -> float:
        return float(self.num_train_timesteps)

    def alpha_sigma(self, timesteps) -> tuple[np.ndarray, np.ndarray]:
        """Signal and noise scale at `timesteps` (0 to `num_train_timesteps`), float64 of the same shape."""
        sigmas = np.asarray(timesteps, np.float64) / self.num_train_timesteps
        return 1 - sigmas, sigmas

    def timesteps(self, alphas, sigmas) -> np.ndarray:
        """The timesteps at which the process has the noise level sigma / alpha."""
        alphas, sigmas = np.asarray(alphas, np.float64), np.asarray(sigmas, np.float64)
        return self.num_train_timesteps * sigmas / (alphas + sigmas)

    def scale(self, alphas: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        """What is 1 at every node of this process."""
        return alphas + sigmas


@dataclass(frozen=True)
class VariancePreserving:
    """
    The DDPM process: alpha^2 + sigma^2 = 1, alpha^2 the running product of 1 - beta.

    diffusers defines it at whole timesteps; between them log(alpha / sigma) is interpolated linearly. A sample ends
    at alpha = 1, sigma = 0, as with diffusers' own schedulers.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: As in
            `diffusers.DDPMScheduler`, which computes the table.
        snr_shift_scale (`float`): What the noise-to-signal ratio sigma^2 / alpha^2 of these betas is multiplied with,
            as in `diffusers.CogVideoXDDIMScheduler`.

    Raises:
        ValueError: If a number is out of range, or the signal does not fall along the timesteps.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 1.0

    kind = "variance_preserving"
    law = "alpha^2 + sigma^2 = 1"

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in asdict(self).items())
        return f"{type(self).__name__}({fields})"

    def __post_init__(self):
        _check_count("num_train_timesteps", self.num_train_timesteps)
        _check_number("beta_start", self.beta_start, 1)
        _check_number("beta_end", self.beta_end, 1)
        _check_number("snr_shift_scale", self.snr_shift_scale, 1e6)
        if not isinstance(self.beta_schedule, str):
            # With `trained_betas`, diffusers would never look at it.
            raise ValueError(f"`beta_schedule` is {reprlib.repr(self.beta_schedule)}, expected the name of one.")
        if not isinstance(self.rescale_betas_zero_snr, bool):
            value = reprlib.repr(self.rescale_betas_zero_snr)
            raise ValueError(f"`rescale_betas_zero_snr` is {value}, expected True or False.")
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", _checked_betas(self.trained_betas))
        with np.errstate(all="ignore"):
            log_ratios = self._log_ratios
        if not (np.isfinite(log_ratios).all() and (np.diff(log_ratios) <= 0).all()):
            raise ValueError(
                f"The betas {reprlib.repr(self.betas.tolist())} make no noise process: the signal must fall from "
                "timestep to timestep and begin below 1. Correct the scheduler's config."
            )

    @cached_property
    def _ddpm(self) -> DDPMScheduler:
        # Numbers are wanted, whatever device networks are loaded under.
        with torch.device("cpu"):
            return self._make_ddpm()

    def _make_ddpm(self) -> DDPMScheduler:
        fields = asdict(self)
        scale = fields.pop("snr_shift_scale")
        if scale != 1:
            table = DDPMScheduler(**{**fields, "rescale_betas_zero_snr": False}).alphas_cumprod.double().numpy()
            shifted = table / (scale + (1 - scale) * table)
            fields["trained_betas"] = 1 - shifted / np.append(1.0, shifted[:-1])
        try:
            return DDPMScheduler(**fields)
        except NotImplementedError as error:
            raise ValueError(
                f"`beta_schedule` is {reprlib.repr(self.beta_schedule)}, which diffusers' DDPMScheduler does not know."
            ) from error

    @cached_property
    def betas(self) -> np.ndarray:
        return self._ddpm.betas.numpy()

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        table = self._ddpm.alphas_cumprod.double().numpy()
        # The last entry of a rescaled schedule is zero; diffusers' solvers put 2^-24 in its place.
        return np.maximum(table, 2.0**-24)

    @cached_property
    def _log_ratios(self) -> np.ndarray:
        return 0.5 * (np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod))

    @property
    def max_timestep(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    def alpha_sigma(self, timesteps) -> tuple[np.ndarray, np.ndarray]:
        """Signal and noise scale at `timesteps` (0 to `max_timestep`), float64 of the same shape."""
        log_ratios = np.interp(timesteps, np.arange(len(self._log_ratios)), self._log_ratios)
        return np.sqrt(1 / (1 + np.exp(-2 * log_ratios))), np.sqrt(1 / (1 + np.exp(2 * log_ratios)))

    def timesteps(self, alphas, sigmas) -> np.ndarray:
        """The timesteps at which the process has the noise level sigma / alpha; beyond its ends, the ends."""
        with np.errstate(divide="ignore"):
            log_ratios = np.log(np.asarray(alphas, np.float64)) - np.log(np.asarray(sigmas, np.float64))
        return np.interp(-log_ratios, -self._log_ratios, np.arange(len(self._log_ratios)))

    def scale(self, alphas: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        """What is 1 at every node of this process."""
        return np.hypot(alphas, sigmas)


def _check_count(name: str, value):
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(
            f"`{name}` is {reprlib.repr(value)}, expected a whole number from 1 to {MAX_TRAIN_TIMESTEPS}."
        )


def _check_number(name: str, value, maximum: float):
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= maximum:
        raise ValueError(f"`{name}` is {reprlib.repr(value)}, expected a number above 0 and up to {maximum:g}.")


def _checked_betas(betas) -> tuple[float, ...]:
    try:
        betas = tuple(float(beta) for beta in betas)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`trained_betas` is {reprlib.repr(betas)}, expected a list of numbers.") from error
    _check_count("len(trained_betas)", len(betas))
    for index, beta in enumerate(betas):
        _check_number(f"trained_betas[{index}]", beta, 1)
    return betas


NoiseProcess = FlowMatching | VariancePreserving
