"""Damped Gauss-Newton on the end-point error, from forward evaluations alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver

from ..launch.processes import gather
from ..pipeline.rollout import Batch, Run, mean_squares, recorded_run, rollout, some_elements
from .parameters import Entry, SolverFamily


# Of the first step that is tried, and the least.
DAMPING, LEAST_DAMPING = 1e-2, 1e-8
# Steps tried on one Jacobian at most, and the gain under which a new one is worth more than another step.
MAX_TRIALS = 8
MIN_GAIN = 0.03
# Shares of the promised gain from which on the next step is damped less, and under which it is damped more.
GOOD, POOR = 0.7, 0.25
# Of the change of a difference quotient.
MAX_HALVINGS = 40
# Columns of J smaller than this share of the largest are rounding.
USABLE = 1e-9


@dataclass(frozen=True)
class Fitted:
    """
    Where an iteration has ended.

    Args:
        vector (`np.ndarray`): Of the family.
        loss (`float`): There, as a share of the loss where it began.
    """

    vector: np.ndarray
    loss: float


def gauss_newton_iteration(
    family: SolverFamily,
    vector: np.ndarray,
    train: Sequence[Batch],
    known: Sequence[torch.Tensor],
    times_only: bool = False,
    max_trials: int = MAX_TRIALS,
) -> Fitted:
    """
    Take one Jacobian of the end-point error and as many steps as it is good for.

        loss = mean over samples of e^2 / e_known,    e^2 = mean of r^2,    r = x_N - teacher's end point
        step = -(J^T W J + damping * M)^-1 J^T W r,    M = family.damping(J^T W J)

    where W weighs a sample by 1 / e_known, the error of the best solver that was known before: so neither do samples
    rule that every solver finds hard, as they would with weights of one, nor those that are nearly exact already, as
    they would with 1 / e_known^2. Columns of J are difference quotients of runs that branch off at the step that feels
    an entry first. Each step that is taken corrects J by Broyden's rank-one update.

    Args:
        family, vector: Where to search and where to start.
        train: This process's samples to fit. What all processes' samples say comes together as J^T W J, J^T W r and
            errors, so the outcome is the same on any number of processes.
        known: e_known of every sample of each batch.
        times_only (`bool`): Whether only the node times are searched.
        max_trials (`int`): Steps that are tried at most.

    Returns:
        `Fitted`: The vector of the smallest loss; the one where it began if no step is any good.

    Raises:
        ValueError: If the solver, or one that differs a little, does not end at finite numbers.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963; Broyden, "A class of
    methods for solving nonlinear simultaneous equations", 1965.
    """
    model = _LinearModel(family, vector, train, known, times_only)
    first_loss = model.loss
    if first_loss == 0 or not len(model.parameters):
        return Fitted(vector, 1.0)
    damping, reach = DAMPING, 1.0
    for _ in range(max_trials):
        gain = model.try_step(model.damped_step(damping, reach))
        if gain > GOOD * model.promised:
            damping, reach = max(damping / 4, LEAST_DAMPING), min(2 * reach, 1.0)
        elif gain < POOR * model.promised:
            damping, reach = 4 * damping, reach / 2
        if 0 < gain < MIN_GAIN:
            break
    return Fitted(model.vector, model.loss / first_loss)


class _LinearModel:
    """
    r(vector + step) ~ r + J step on some batches, and the weighted loss of it.

    Attributes:
        vector: Where r was taken; moves with every successful `try_step`.
        parameters: Which of its numbers J has columns of.
        residuals: r at [`some_elements`] of a sample, one tensor (batch, elements) per batch.
        jacobians: J at the same, one tensor (parameters, batch, elements) per batch; both on the CPU.
        loss (`float`): Of all elements.
        promised (`float`): By which share the loss would fall at the last `damped_step` if J were right.
    """

    def __init__(
        self,
        family: SolverFamily,
        vector: np.ndarray,
        train: Sequence[Batch],
        known: Sequence[torch.Tensor],
        times_only: bool,
    ):
        self.family, self.vector, self.train, self.known = family, vector, train, known
        entries = family.entries(vector)
        searched = family.searched(entries, times_only)
        chain = family.entry_jacobian(vector)[[entry.index for entry in searched]]
        self.parameters = np.flatnonzero(chain.any(0))
        chain = torch.from_numpy(chain[:, self.parameters])
        self.solver = family.solver(entries)
        self.jacobians, self.promised, seen = [], 0.0, []
        for batch in train:
            run = recorded_run(batch.field, self.solver)
            columns = torch.stack([_difference_quotient(family, entries, entry, batch, run) for entry in searched])
            self.jacobians.append(torch.einsum("ep,ebd->pbd", chain.to(columns), columns))
            seen.append(_residual(run.end, batch))
        self.residuals, self.loss = self._weighed(seen)

    def _weighed(self, seen: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], float]:
        """Residuals of the batches, and the loss."""
        squares = [of_samples / e for (_, of_samples), e in zip(seen, self.known, strict=True)]
        loss = float(torch.cat(gather(self.train, squares)).mean())
        return [residual for residual, _ in seen], loss if np.isfinite(loss) else np.inf

    def damped_step(self, damping: float, reach: float) -> np.ndarray:
        """The Levenberg-Marquardt step within a share of the family's limits, zero where J has no usable column."""
        products = [self._products(*each) for each in zip(self.residuals, self.jacobians, self.known, strict=True)]
        normal, gradient, squares = (sum(each) for each in zip(*gather(self.train, products), strict=True))
        if not (np.isfinite(normal).all() and np.isfinite(gradient).all()):
            raise ValueError(
                f"A solver of {self.family.num_steps} steps, or one that differs from it a little, does not end at "
                "finite numbers, so there is no direction to search in. Run the pipeline's network in float32 "
                "(`--mixed-precision no`), or search for more steps."
            )
        step, diagonal = np.zeros(len(self.vector)), np.diag(normal)
        self._metric = self.family.damping(normal, self.parameters)
        np.fill_diagonal(self._metric, np.maximum(np.diag(self._metric), USABLE * diagonal.max()))
        if diagonal.max() > 0:
            limits = reach * self.family.limits[self.parameters]
            taken = confined_step(normal + damping * self._metric, gradient, limits)
            step[self.parameters] = taken
            self.promised = -float(2 * gradient @ taken + taken @ normal @ taken) / squares
        return step

    def _products(
        self, r: torch.Tensor, jacobian: torch.Tensor, known: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """J^T W J, J^T W r and r^T W r of one batch: only one sample's J is ever held in float64."""
        normal, gradient, squares = 0.0, 0.0, 0.0
        for k, error in enumerate(known.tolist()):
            columns = jacobian[:, k].double()
            normal = normal + columns @ columns.T / error
            gradient = gradient + columns @ r[k].double() / error
            squares += float(r[k].double().square().sum()) / error
        return normal.numpy(), gradient.numpy(), squares

    def try_step(self, step: np.ndarray) -> float:
        """
        Run the solver at the end of a step, correct J by what was seen, and move there if the loss fell.

        Returns:
            `float`: By which share the loss fell; minus infinity if there is no solver or no finite loss there.
        """
        vector = self.vector + step
        try:
            solver = self.family.solver(self.family.entries(vector))
        except ValueError:
            return -np.inf
        residuals, loss = self._weighed([_residual(rollout(batch.field, solver), batch) for batch in self.train])
        if loss == np.inf or not step.any():
            return -np.inf
        self._broyden_update(step[self.parameters], residuals)
        gain = 1 - loss / self.loss
        if gain > 0:
            self.vector, self.solver, self.residuals, self.loss = vector, solver, residuals, loss
        return gain

    def _broyden_update(self, step: np.ndarray, residuals: list[torch.Tensor]):
        """J += (r_new - r - J step) m^T / (m . step), m = M step: the least change that explains r_new."""
        dual = self._metric @ step / (step @ self._metric @ step)
        for old, new, jacobian in zip(self.residuals, residuals, self.jacobians, strict=True):
            surprise = new - old - torch.einsum("p,pbd->bd", torch.from_numpy(step).to(jacobian), jacobian)
            jacobian += torch.from_numpy(dual).to(jacobian)[:, None, None] * surprise


def confined_step(matrix: np.ndarray, gradient: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """
    -matrix^-1 gradient, but where a number of it would be beyond its limit, that stays there and the others are what
    is best then. Were the whole step shortened instead, one number that hardly matters could stop all others.
    """
    step, free = np.zeros_like(gradient), np.ones(len(gradient), dtype=bool)
    while free.any():
        pull = gradient[free] + matrix[np.ix_(free, ~free)] @ step[~free]
        step[free] = -np.linalg.solve(matrix[np.ix_(free, free)], pull)
        beyond = free & (np.abs(step) > limits)
        if not beyond.any():
            break
        step[beyond] = np.sign(step[beyond]) * limits[beyond]
        free &= ~beyond
    return step


def _residual(end: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """r at the elements that derivatives are of, shape (batch, elements), and e^2 of each sample, of all elements."""
    residual = end.cpu() - batch.target
    return some_elements(residual), mean_squares(residual)


def _difference_quotient(
    family: SolverFamily, entries: np.ndarray, entry: Entry, batch: Batch, run: Run
) -> torch.Tensor:
    """d x_N / d entry, shape (batch, elements)."""
    solver, change = _neighbour(family, entries, entry)
    branch = Run(run.states[: entry.step + 1], run.history[: entry.known])
    return some_elements((rollout(batch.field, solver, branch) - run.end) / change).cpu()


def _neighbour(family: SolverFamily, entries: np.ndarray, entry: Entry) -> tuple[SearchedSolver, float]:
    """
    The solver where an entry has changed, and by how much: less, and to either side, where nodes are in the way.

    Raises:
        ValueError: If there is none however small the change.
    """
    change = entry.change
    for _ in range(MAX_HALVINGS):
        changed = entries.copy()
        changed[entry.index] += change
        try:
            return family.solver(changed), change
        except ValueError:
            change = -change / 2
    raise ValueError(f"No solver is near {family.solver(entries)}: its nodes have met.")
