"""Multistep tables in the logarithm of the noise level: what serves variance-preserving models best untuned."""

import numpy as np

from .grids import geometric_grid
from .process import VariancePreserving
from .solver import SearchedSolver


ORDER = 3
# From so many steps on a corrector pays, where a few noises are hard most; with fewer it is unstable under guidance.
CORRECTED_STEPS = 16
# Integrands are polynomials times an exponential; on steps of a few units of log noise level this is exact to 1e-12.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def few_step_table(process: VariancePreserving, num_steps: int) -> SearchedSolver:
    """
    The table of a variance-preserving model for which nothing was searched.

    Args:
        num_steps (`int`): N, at least 1.
    """
    table = exponential_adams_bashforth if num_steps < CORRECTED_STEPS else exponential_predictor_corrector
    return table(*geometric_grid(process, num_steps), ORDER)


def exponential_adams_bashforth(
    timesteps: np.ndarray, alphas: np.ndarray, sigmas: np.ndarray, order: int
) -> SearchedSolver:
    """
    The table that extrapolates the predicted noise as a polynomial in lambda = log(sigma / alpha).

        x' / alpha' = x / alpha + sum_j e_j * integral of L_ij(log(kappa)) dkappa from sigma / alpha to sigma' / alpha'

    where e_j is the noise predicted at step j and L_ij are the Lagrange polynomials of the last min(order, i+1) values
    of lambda. The last step, into sigma = 0, where lambda has no end, extrapolates velocities in sigma / (alpha +
    sigma) instead.

    Args:
        timesteps, alphas, sigmas: As in [`SearchedSolver`]; no alpha may be 0.
        order (`int`): 1 is DDIM but for the last step.

    Returns:
        `SearchedSolver`: In the velocity frame.

    Source: Zhang and Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", arXiv 2204.13902 (DEIS).
    """
    n, scales, logs = len(timesteps), alphas + sigmas, np.log(sigmas[:-1] / alphas[:-1])
    states, velocities = _of_noise_and_velocities(n)
    noises = np.zeros_like(velocities)
    for i in range(n):
        noises[i] = (states[i] + alphas[i] * velocities[i]) / scales[i]
        if i + 1 < n:
            first = max(0, i + 1 - order)
            integral = _lagrange_integrals(logs[first : i + 1], *logs[i : i + 2]) @ noises[first : i + 1]
            states[i + 1] = alphas[i + 1] * (states[i] / alphas[i] + integral)
    states[n] = _into_data(states[n - 1], timesteps, alphas, sigmas, order)
    return SearchedSolver.from_states(timesteps, alphas, sigmas, states, "velocity", consistent=True)


def exponential_predictor_corrector(
    timesteps: np.ndarray, alphas: np.ndarray, sigmas: np.ndarray, order: int
) -> SearchedSolver:
    """
    The table that extrapolates the predicted data, and mends each step by what is predicted where it ends.

        x' / sigma' = x~ / sigma + sum_j d_j * integral of L_ij(log(rho)) drho from alpha / sigma to alpha' / sigma'

    where d_j is the data predicted at step j, in x_j; L_ij are the Lagrange polynomials of the last min(order, i+1)
    values of log(alpha / sigma); and x~ is the same step into x once more, with the values up to i in place of i-1.
    The last step is as in [`exponential_adams_bashforth`].

    Args:
        timesteps, alphas, sigmas, order: As there.

    Returns:
        `SearchedSolver`: In the velocity frame.

    Source: Zhao et al., "UniPC", arXiv 2302.04867.
    """
    n, scales, logs = len(timesteps), alphas + sigmas, np.log(alphas[:-1] / sigmas[:-1])
    states, velocities = _of_noise_and_velocities(n)
    mended, data = states.copy(), np.zeros_like(velocities)

    def step(i: int, last: int) -> np.ndarray:
        """From the mended x_i to x_(i+1), by the data predicted up to step `last`."""
        known = slice(max(0, last + 1 - order), last + 1)
        integral = _lagrange_integrals(logs[known], *logs[i : i + 2]) @ data[known]
        return sigmas[i + 1] * (mended[i] / sigmas[i] + integral)

    for i in range(n):
        data[i] = (states[i] - sigmas[i] * velocities[i]) / scales[i]
        if i > 0:
            mended[i] = step(i - 1, last=i)
        if i + 1 < n:
            states[i + 1] = step(i, last=i)
    states[n] = _into_data(mended[n - 1], timesteps, alphas, sigmas, order)
    return SearchedSolver.from_states(timesteps, alphas, sigmas, states, "velocity", consistent=True)


def _of_noise_and_velocities(n: int) -> tuple[np.ndarray, np.ndarray]:
    """x_0 ... x_N, all as at the start, and p_0 ... p_(N-1) as coefficients of the noise and of these velocities."""
    return np.eye(1, n + 1).repeat(n + 1, 0), np.eye(n, n + 1, 1)


def _into_data(state: np.ndarray, timesteps, alphas, sigmas, order: int) -> np.ndarray:
    """The last step, by velocities in sigma / (alpha + sigma)."""
    n, scales = len(timesteps), alphas + sigmas
    coefficients = SearchedSolver.adams_bashforth(timesteps, alphas, sigmas, "velocity", order).coefficients[-1]
    length = sigmas[n] / scales[n] - sigmas[n - 1] / scales[n - 1]
    return scales[n] * (state / scales[n - 1] + length * coefficients @ _of_noise_and_velocities(n)[1])


def _lagrange_integrals(nodes: np.ndarray, start: float, end: float) -> np.ndarray:
    """Integrals of the Lagrange polynomials on `nodes` times exp, from `start` to `end`."""
    half = (end - start) / 2
    points = start + half * (1 + _POINTS)
    weights = half * _WEIGHTS * np.exp(points)
    others = [np.delete(nodes, j) for j in range(len(nodes))]
    return np.array(
        [
            weights @ np.prod((points[:, None] - rest) / (node - rest), 1)
            for node, rest in zip(nodes, others, strict=True)
        ]
    )
