"""Adams-Bashforth on the predicted noise in the logarithm of the noise level: what serves few steps best untuned."""

import numpy as np

from .grids import geometric_grid
from .process import VariancePreserving
from .solver import SearchedSolver


ORDER = 3
# Integrands are polynomials times an exponential; on steps of a few units of log noise level this is exact to 1e-12.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def few_step_table(process: VariancePreserving, num_steps: int) -> SearchedSolver:
    """
    The table of a variance-preserving model for which nothing was searched.

    Args:
        num_steps (`int`): N, at least 1.
    """
    return exponential_adams_bashforth(*geometric_grid(process, num_steps), ORDER)


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
    into_data = SearchedSolver.adams_bashforth(timesteps, alphas, sigmas, "velocity", order).coefficients[-1]
    # x_i and e_i as coefficients of the noise that a run begins with and of the velocities p_0 ... p_(N-1).
    states, noises, velocities = np.eye(1, n + 1).repeat(n + 1, 0), np.zeros((n, n + 1)), np.eye(n, n + 1, 1)
    for i in range(n):
        noises[i] = (states[i] + alphas[i] * velocities[i]) / scales[i]
        if i + 1 < n:
            first = max(0, i + 1 - order)
            integral = _lagrange_integrals(logs[first : i + 1], logs[i + 1]) @ noises[first : i + 1]
            states[i + 1] = alphas[i + 1] * (states[i] / alphas[i] + integral)
    length = sigmas[n] / scales[n] - sigmas[n - 1] / scales[n - 1]
    states[n] = scales[n] * (states[n - 1] / scales[n - 1] + length * into_data @ velocities)
    return SearchedSolver.from_states(timesteps, alphas, sigmas, states, "velocity", consistent=True)


def _lagrange_integrals(nodes: np.ndarray, end: float) -> np.ndarray:
    """Integrals of the Lagrange polynomials on `nodes` times exp, from the last node to `end`."""
    half = (end - nodes[-1]) / 2
    points = nodes[-1] + half * (1 + _POINTS)
    weights = half * _WEIGHTS * np.exp(points)
    others = [np.delete(nodes, j) for j in range(len(nodes))]
    return np.array(
        [
            weights @ np.prod((points[:, None] - rest) / (node - rest), 1)
            for node, rest in zip(nodes, others, strict=True)
        ]
    )
