"""Noise processes: how much signal and noise a state holds, and what a network's output says of it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
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
    """
    a, b = _DATA_AND_NOISE_WEIGHTS[source](alpha, sigma)
    c, d = _DATA_AND_NOISE_WEIGHTS[target](alpha, sigma)
    determinant = alpha * b - sigma * a
    return (c * b - d * a) / determinant, (alpha * d - sigma * c) / determinant


@dataclass(frozen=True)
class FlowMatching:
    """
    Straight paths from data to noise: alpha = 1 - sigma, timestep = num_train_timesteps * sigma.

    Source: Lipman et al., "Flow Matching for Generative Modeling", arXiv 2210.02747; the scale of `timestep` is
    diffusers'.
    """

    num_train_timesteps: int = 1000

    kind = "flow_matching"

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
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 1.0

    kind = "variance_preserving"

    @cached_property
    def _ddpm(self) -> DDPMScheduler:
        fields = asdict(self)
        scale = fields.pop("snr_shift_scale")
        if scale != 1:
            table = DDPMScheduler(**{**fields, "rescale_betas_zero_snr": False}).alphas_cumprod.double().numpy()
            shifted = table / (scale + (1 - scale) * table)
            fields["trained_betas"] = 1 - shifted / np.append(1.0, shifted[:-1])
        return DDPMScheduler(**fields)

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


NoiseProcess = FlowMatching | VariancePreserving
_PROCESSES = {cls.kind: cls for cls in (FlowMatching, VariancePreserving)}


def process_from_config(config: Mapping) -> NoiseProcess:
    """
    The noise process that a diffusers scheduler config describes.

    Raises:
        ValueError: If it is of another kind: EDM (SVD, Stable Audio, Cosmos 1 and 2), TrigFlow, Wuerstchen, or flows
            that run from data to noise (Mochi, LongCat-AudioDiT).
    """
    signs = [key for key in ("invert_sigmas", "scaler", "sigma_data") if config.get(key)]
    if signs or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"The config of {config.get('_class_name', 'this scheduler')} describes neither DDPM's noise process nor "
            f"flow matching from noise to data: it has {', '.join(signs) or 'continuous timesteps'}. A searched "
            "solver is for models of those two; keep the pipeline's own scheduler."
        )
    num_train_timesteps = config.get("num_train_timesteps", 1000)
    if prediction_type_from_config(config) == "flow_prediction":
        return FlowMatching(num_train_timesteps)
    betas = config.get("trained_betas")
    return VariancePreserving(
        num_train_timesteps,
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        beta_schedule=config.get("beta_schedule", "linear"),
        trained_betas=None if betas is None else tuple(float(beta) for beta in betas),
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
        snr_shift_scale=config.get("snr_shift_scale", 1.0),
    )


def prediction_type_from_config(config: Mapping) -> str:
    """
    What the network of a diffusers scheduler config predicts.

    FlowMatch schedulers have no `prediction_type` in their config; their class name tells, or else their `shift`.
    """
    if str(config.get("_class_name", "")).startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return "flow_prediction"
    if "shift" in config and "prediction_type" not in config:
        return "flow_prediction"
    return config.get("prediction_type", "epsilon")


def process_to_json(process: NoiseProcess) -> str:
    """One line of JSON from which `process_from_json` rebuilds the process."""
    return json.dumps({"kind": process.kind, **asdict(process)}, sort_keys=True)


def process_from_json(text: str) -> NoiseProcess:
    """
    Rebuild a process from `process_to_json`.

    Raises:
        ValueError: If `text` is not such a line.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict) or fields.get("kind") not in _PROCESSES:
        raise ValueError(f"`process` is {text!r}, expected a JSON object with `kind` one of {sorted(_PROCESSES)}.")
    kind = fields.pop("kind")
    if fields.get("trained_betas") is not None:
        fields["trained_betas"] = tuple(fields["trained_betas"])
    try:
        return _PROCESSES[kind](**fields)
    except TypeError as error:
        raise ValueError(f"`process` is {text!r}, which does not describe a {kind} process.") from error


def time_grid(
    process: NoiseProcess, num_steps: int, shift: float = 1.0, start: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Nodes uniform in time, then shifted towards the noise (shift > 1) or the data (shift < 1).

        t = start * max_timestep * shift * u / (1 + (shift - 1) * u),   u = 1, 1 - 1/N, ..., 1/N

    and the last node is the data.

    Args:
        num_steps (`int`): N, at least 1.
        shift (`float`): Positive; 1 is the uniform grid.
        start (`float`): Where to begin, as a share of `max_timestep`. A variance-preserving process is nearly pure
            noise long before its end, and steps spent there are lost.

    Returns:
        `timesteps` (N), `alphas` (N+1), `sigmas` (N+1), float64.

    Raises:
        ValueError: If `shift` is not positive.
    """
    if not shift > 0:
        raise ValueError(f"`shift` is {shift}, expected a positive number.")
    u = 1 - np.arange(num_steps) / num_steps
    return _grid_on(process, process.max_timestep * start * np.minimum(shift * u / (1 + (shift - 1) * u), 1))


def log_snr_grid(process: VariancePreserving, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Nodes uniform in log(alpha / sigma) from the noisiest to the cleanest timestep of a process; the last is the data.

    Args:
        num_steps (`int`): N, at least 2.

    Returns:
        `timesteps` (N), `alphas` (N+1), `sigmas` (N+1), float64.
    """
    alphas, sigmas = process.alpha_sigma([process.max_timestep, 0.0])
    log_ratios = np.linspace(*np.log(alphas / sigmas), num_steps)
    return _grid_on(process, process.timesteps(np.exp(log_ratios), np.ones(num_steps)))


def _grid_on(process: NoiseProcess, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    alphas, sigmas = process.alpha_sigma(timesteps)
    return timesteps, np.append(alphas, 1.0), np.append(sigmas, 0.0)
