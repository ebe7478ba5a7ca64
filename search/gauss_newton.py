"""Damped Gauss-Newton on the end-point error, from forward evaluations alone."""

from collections.abc import Sequence

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver

from .parameters import Entry, SolverFamily
from .processes import gather
from .rollout import Batch, Run, rollout


DAMPING = 1e-2
# Errors beyond this many times the median sample's count by less than their square.
ROBUSTNESS = 4.0
# Where most samples are exact already.
SMALLEST_SCALE = 1e-12
# Steps tried on one Jacobian at most, and the gain under which a new one is worth more than another step.
MAX_TRIALS = 5
MIN_GAIN = 0.03


def gauss_newton_iteration(
    family: SolverFamily, vector: np.ndarray, train: Sequence[Batch], times_only: bool
) -> tuple[np.ndarray, float]:
    """
    Take one Jacobian of the end-point error and as many steps as it is good for.

        step = -(J^T W J + damping * diag(J^T W J))^-1 J^T W r,     r = x_N - teacher's end point

    where W weighs the samples by 1 / (1 + (e / c)^2), e a sample's error and c = 4 * the median of e: the weights of
    the robust loss c^2 log(1 + (e / c)^2), without which a sample that ends in another mode of the distribution would
    rule. Columns of J are difference quotients of runs that branch off at the step that feels an entry first. Each
    trial corrects J by Broyden's rank-one update.

    Args:
        family, vector: Where to search and where to start.
        train: This process's samples to fit. What all processes' samples say comes together as J^T W J, J^T W r and
            errors, so the outcome is the same on any number of processes.
        times_only (`bool`): Whether only the node times are searched.

    Returns:
        The vector of the smallest loss, and by which share the loss fell.

    Raises:
        ValueError: If the solver, or one that differs a little, does not end at finite numbers.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963; Broyden, "A class of
    methods for solving nonlinear simultaneous equations", 1965.
    """
    damping = DAMPING
    model = _LinearModel(family, vector, train, times_only)
    first_loss = model.loss
    if first_loss == 0:
        return vector, 0.0
    for _ in range(MAX_TRIALS):
        gain = model.try_step(model.damped_step(damping))
        damping = 4 * damping if gain <= 0 else max(damping / 4, 1e-8)
        if 0 < gain < MIN_GAIN:
            break
    return model.vector, 1 - model.loss / first_loss


class _LinearModel:
    """
    r(vector + step) ~ r + J step on some batches, with the robust loss around it.

    Attributes:
        vector: Where r was taken; moves with every successful `try_step`.
        residuals: r, one tensor (batch, elements of a sample) per batch.
        jacobians: J, one tensor (parameters, batch, elements) per batch.
        scale (`float`): c of the robust loss.
    """

    def __init__(self, family: SolverFamily, vector: np.ndarray, train: Sequence[Batch], times_only: bool):
        self.family, self.vector, self.train = family, vector, train
        entries = family.entries(vector)
        searched = family.searched(entries, times_only)
        chain = family.entry_jacobian(vector)[[entry.index for entry in searched]]
        self.parameters = np.flatnonzero(chain.any(0))
        chain = torch.from_numpy(chain[:, self.parameters])
        solver = family.solver(entries)
        ends, self.jacobians = [], []
        for batch in train:
            run = rollout(batch.field, solver)
            columns = torch.stack([_difference_quotient(family, entries, entry, batch, run) for entry in searched])
            self.jacobians.append(torch.einsum("ep,ebd->pbd", chain.to(columns), columns))
            ends.append(run.end)
        self.residuals = _residuals(ends, train)
        self.scale = max(ROBUSTNESS * float(self._squares(self.residuals).median().sqrt()), SMALLEST_SCALE)
        self.loss = self._loss(self.residuals)

    def _squares(self, residuals: list[torch.Tensor]) -> torch.Tensor:
        """e^2 of the samples of all processes."""
        return torch.cat(gather(self.train, [_mean_squares(r).cpu() for r in residuals]))

    def _loss(self, residuals: list[torch.Tensor]) -> float:
        loss = float(torch.log1p(self._squares(residuals) / self.scale**2).mean()) * self.scale**2
        return loss if np.isfinite(loss) else np.inf

    def damped_step(self, damping: float) -> np.ndarray:
        """The Levenberg-Marquardt step of the parameters."""
        products = [self._products(r, J) for r, J in zip(self.residuals, self.jacobians, strict=True)]
        normal, gradient = (sum(each) for each in zip(*gather(self.train, products), strict=True))
        if not (np.isfinite(normal).all() and np.isfinite(gradient).all()):
            raise ValueError(
                f"A solver of {self.family.num_steps} steps, or one that differs from it a little, does not end at "
                "finite numbers, so there is no direction to search in. Run the pipeline's network in float32 "
                "(`--mixed-precision no`), or search for more steps."
            )
        self._metric = np.maximum(np.diag(normal), 1e-9 * np.diag(normal).max())
        return -np.linalg.solve(normal + damping * np.diag(self._metric), gradient)

    def _products(self, r: torch.Tensor, jacobian: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """J^T W J and J^T W r of one batch, sample by sample: only one sample's J is ever held in float64."""
        normal, gradient = 0.0, 0.0
        for k, square in enumerate(_mean_squares(r).tolist()):
            weight, columns = 1 / (1 + square / self.scale**2), jacobian[:, k].double()
            normal = normal + weight * (columns @ columns.T)
            gradient = gradient + weight * (columns @ r[k].double())
        return normal.cpu().numpy(), gradient.cpu().numpy()

    def try_step(self, step: np.ndarray) -> float:
        """
        Run the solver at the end of a step, correct J by what was seen, and move there if the loss fell.

        Returns:
            `float`: By which share the loss fell; minus infinity if there is no solver or no finite loss there.
        """
        vector = self.vector.copy()
        vector[self.parameters] += step
        try:
            solver = self.family.solver(self.family.entries(vector))
        except ValueError:
            return -np.inf
        residuals = _residuals([rollout(batch.field, solver).end for batch in self.train], self.train)
        loss = self._loss(residuals)
        if loss == np.inf:
            return -np.inf
        self._broyden_update(step, residuals)
        gain = 1 - loss / self.loss
        if gain > 0:
            self.vector, self.residuals, self.loss = vector, residuals, loss
        return gain

    def _broyden_update(self, step: np.ndarray, residuals: list[torch.Tensor]):
        """J += (r_new - r - J step) m^T / (m . step), m = metric * step: the least change that explains r_new."""
        dual = self._metric * step / (step @ (self._metric * step))
        for old, new, jacobian in zip(self.residuals, residuals, self.jacobians, strict=True):
            surprise = new - old - torch.einsum("p,pbd->bd", torch.from_numpy(step).to(jacobian), jacobian)
            jacobian += torch.from_numpy(dual).to(jacobian)[:, None, None] * surprise


def _residuals(ends: Sequence[torch.Tensor], batches: Sequence[Batch]) -> list[torch.Tensor]:
    return [(end - batch.target).flatten(1) for end, batch in zip(ends, batches, strict=True)]


def _mean_squares(residuals: torch.Tensor) -> torch.Tensor:
    """e^2 of each sample, float64."""
    return residuals.double().square().mean(1)


def _difference_quotient(
    family: SolverFamily, entries: np.ndarray, entry: Entry, batch: Batch, run: Run
) -> torch.Tensor:
    """d x_N / d entry, shape (batch, elements of a sample)."""
    solver, change = _neighbour(family, entries, entry)
    branch = Run(run.states[: entry.step + 1], run.history[: entry.known])
    return ((rollout(batch.field, solver, branch).end - run.end) / change).flatten(1)


def _neighbour(family: SolverFamily, entries: np.ndarray, entry: Entry) -> tuple[SearchedSolver, float]:
    """The solver where an entry has changed, and by how much: less, and to either side, where nodes are in the way."""
    change = entry.change
    while True:
        changed = entries.copy()
        changed[entry.index] += change
        try:
            return family.solver(changed), change
        except ValueError:
            change = -change / 2
