"""Grids: nodes that are chosen by a formula."""

import numpy as np

from .process import NoiseProcess, VariancePreserving


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


def geometric_grid(process: VariancePreserving, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Nodes uniform in log(sigma / alpha), but for the last, which is the data.

    They begin at N^2, with less than ten steps at the lesser of 2 N^2 and 100, and end at 3 / N^2, or as far as the
    process reaches.

    Few steps are lost on what is nearly noise or nearly data; searched solvers of 5, 8 and 10 steps spread so too. But
    who begins late misses the mean of the data, which is far from zero where images are mostly dark.

    Args:
        num_steps (`int`): N, at least 1.

    Returns:
        `timesteps` (N), `alphas` (N+1), `sigmas` (N+1), float64.
    """
    alphas, sigmas = process.alpha_sigma([process.max_timestep, 0.0])
    noisiest, cleanest = sigmas / alphas
    first = max(num_steps**2, min(2 * num_steps**2, 100))
    levels = np.geomspace(min(noisiest, first), max(cleanest, 3 / num_steps**2), num_steps)
    return _grid_on(process, process.timesteps(np.ones(num_steps), levels))


def _grid_on(process: NoiseProcess, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    alphas, sigmas = process.alpha_sigma(timesteps)
    return timesteps, np.append(alphas, 1.0), np.append(sigmas, 0.0)
