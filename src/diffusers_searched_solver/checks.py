"""What the tables of a [`SearchedSolver`] promise, checked where one is made."""

import reprlib

import numpy as np

from .process import FRAME_PREDICTIONS


ROW_SUM_TOLERANCE = 1e-6


def check_table(solver):
    """Refuse tables that break a promise of the class, naming the table, the value and the promise."""
    if solver.frame not in FRAME_PREDICTIONS:
        raise ValueError(f"`frame` is {solver.frame!r}, expected one of {sorted(FRAME_PREDICTIONS)}.")
    n = solver.timesteps.size
    if solver.timesteps.ndim != 1 or n == 0:
        raise ValueError(f"`timesteps` has shape {solver.timesteps.shape}, expected one number a step, at least one.")
    shapes = {"alphas": (n + 1,), "sigmas": (n + 1,), "coefficients": (n, n)}
    for name, shape in shapes.items():
        if getattr(solver, name).shape != shape:
            raise ValueError(f"`{name}` has shape {getattr(solver, name).shape}, expected {shape} for {n} steps.")
    for name in ("timesteps", *shapes):
        table = getattr(solver, name)
        if not np.isfinite(table).all():
            place = np.argwhere(~np.isfinite(table))[0].tolist()
            raise ValueError(f"`{name}` holds {table[tuple(place)]} at {place}, expected finite numbers.")
    check_nodes(solver.alphas, solver.sigmas)
    if (np.diff(solver.timesteps) >= 0).any() or solver.timesteps[-1] < 0:
        raise ValueError(
            f"`timesteps` is {reprlib.repr(solver.timesteps.tolist())}, expected strictly decreasing numbers of at "
            "least 0."
        )
    check_coefficients(solver)


def check_nodes(alphas: np.ndarray, sigmas: np.ndarray):
    """Refuse nodes that do not run from noise to data."""
    for name, table, positive in (("alphas", alphas, alphas[1:]), ("sigmas", sigmas, sigmas[:-1])):
        if table.min() < 0 or positive.min() <= 0:
            raise ValueError(
                f"`{name}` goes down to {table.min()}, expected positive scales (the first alpha and the last sigma "
                "may be 0)."
            )
    rises = np.flatnonzero(alphas[1:] * sigmas[:-1] <= alphas[:-1] * sigmas[1:])
    if rises.size:
        raise ValueError(
            f"The noise level sigma / alpha does not fall from node {rises[0]} to node {rises[0] + 1} of "
            f"{len(alphas) - 1} steps. Nodes must run from noise to data."
        )


def check_coefficients(solver):
    """Refuse coefficients above the diagonal, and rows of a consistent solver that do not sum to one."""
    above = np.argwhere(np.triu(solver.coefficients, 1))
    if above.size:
        i, j = above[0].tolist()
        raise ValueError(
            f"`coefficients` is {solver.coefficients[i, j]} at [{i}, {j}], above the diagonal: step {i} cannot use "
            f"the prediction of step {j}. Expected 0."
        )
    row_sums = solver.coefficients.sum(1)
    off = np.flatnonzero(abs(row_sums - 1) > ROW_SUM_TOLERANCE)
    if solver.consistent and off.size:
        raise ValueError(
            f"Row {off[0]} of `coefficients` sums to {row_sums[off[0]]:.6g}, expected 1 in a consistent solver. "
            "Correct the row, or declare `consistent=False` if its sum was searched too."
        )
