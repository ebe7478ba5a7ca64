"""SearchedSolver: a multistep solver as a frozen table, and the only implementation of its update."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.polynomial import Polynomial

from .checks import check_coefficients, check_nodes, check_table
from .process import FRAME_PREDICTIONS, convert_prediction


@dataclass(frozen=True, eq=False)
class SearchedSolver:
    """
    A linear multistep solver of N steps on fixed nodes.

    At step i the network is called at `timesteps[i]`, its output is expressed in `frame` as the prediction p_i, and

        x' = (k' / k) * x + (m' - k' * m / k) * sum_{j <= i} c_ij * p_j

    where k, m = sigma, alpha          if frame is "data":      p = D, the data
          k, m = alpha + sigma, sigma  if frame is "velocity":  p = E - D, noise minus data

    and primes are the next node. The state x = alpha * D + sigma * E divided by k is (m / k) * p plus something that
    does not depend on p, so a constant prediction is integrated exactly if a row of c sums to one. On flow-matching
    nodes (alpha = 1 - sigma) the velocity update is x' = x + (sigma' - sigma) * sum_j c_ij p_j.

    Args:
        timesteps (`np.ndarray`, shape (N,)): What the network is called with, in diffusers' unit (0 to 1000), strictly
            decreasing. Free of the nodes: a searched solver may call the network at a time other than its node's.
        alphas, sigmas (`np.ndarray`, shape (N+1,)): Signal and noise scale at the nodes, non-negative; sigma / alpha
            is strictly decreasing. Only the last sigma may be 0, only the first alpha may be 0.
        coefficients (`np.ndarray`, shape (N, N)): c, lower triangle including the diagonal.
        frame (`str`): "velocity" or "data".
        consistent (`bool`): Whether every row of c sums to one; it is checked if so.

    Raises:
        ValueError: If a table has the wrong shape or breaks one of the properties above.

    Source: Wang et al., "Differentiable Solver Search for Fast Diffusion Sampling", arXiv 2505.21114, section 4, whose
    family has row sums of one and timesteps equal to the nodes' times.

    Example:

        >>> solver = SearchedSolver(
        ...     timesteps=[1000, 500],
        ...     alphas=[0, 0.5, 1],
        ...     sigmas=[1, 0.5, 0],
        ...     coefficients=[[1, 0], [-0.5, 1.5]],
        ...     frame="velocity",
        ... )
        >>> solver.num_steps, solver.update_weights(1, 2)
        (2, (1.0, (0.25, -0.75)))
    """

    timesteps: np.ndarray
    alphas: np.ndarray
    sigmas: np.ndarray
    coefficients: np.ndarray
    frame: str
    consistent: bool = True

    def __post_init__(self):
        for name in ("timesteps", "alphas", "sigmas", "coefficients"):
            table = np.array(getattr(self, name), dtype=np.float64)
            table.setflags(write=False)
            object.__setattr__(self, name, table)
        check_table(self)
        object.__setattr__(self, "_weights", _update_weights(self))

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def prediction(
        self, model_output: torch.Tensor, sample: torch.Tensor, index: int, prediction_type: str
    ) -> torch.Tensor:
        """
        The prediction p_i of step `index` in the solver's frame.

        Args:
            model_output (`torch.Tensor`): The network's output at `timesteps[index]`.
            sample (`torch.Tensor`): The state x_i that the network was called on.
            index (`int`): i, 0 to N-1.
            prediction_type (`str`): What `model_output` is, one of `process.PREDICTION_TYPES`.

        Returns:
            `torch.Tensor`: `model_output` itself if it is in the frame, otherwise a new tensor of at least float32.
        """
        return self._convert(model_output, sample, index, prediction_type, FRAME_PREDICTIONS[self.frame])

    def data(self, model_output: torch.Tensor, sample: torch.Tensor, index: int, prediction_type: str) -> torch.Tensor:
        """The data D that an output points at; arguments and result as of [`prediction`]."""
        return self._convert(model_output, sample, index, prediction_type, "sample")

    def _convert(self, output, sample, index: int, source: str, target: str) -> torch.Tensor:
        u, w = convert_prediction(source, target, float(self.alphas[index]), float(self.sigmas[index]))
        if u == 0:
            return output if w == 1 else output * w
        return weighted_sum(sample, u, [output], [w])

    def conversion(self, index: int, prediction_type: str) -> tuple[float, float]:
        """The weights u and w of p = u * x + w * m, where m is the network's output in step `index`."""
        target = FRAME_PREDICTIONS[self.frame]
        return convert_prediction(prediction_type, target, float(self.alphas[index]), float(self.sigmas[index]))

    def step(self, sample: torch.Tensor, history: Sequence[torch.Tensor], index: int) -> torch.Tensor:
        """
        Advance `sample` from node `index` to the next.

        Args:
            sample (`torch.Tensor`): x, any shape.
            history (sequence of `torch.Tensor`): Predictions in the solver's frame, oldest first, the last one that of
                this step; at most `index` + 1. If there are fewer, the run began mid-way: the weights of predictions
                that do not exist fall on the oldest that does, so that row sums are kept.
            index (`int`): i, 0 to N-1.

        Returns:
            `torch.Tensor`: x', a new tensor; float32 for half-precision samples, otherwise of the sample's dtype.

        Example:

            >>> grid = np.array([1000, 500]), np.array([0, 0.5, 1]), np.array([1, 0.5, 0])
            >>> solver = SearchedSolver.adams_bashforth(*grid, "velocity", order=2)
            >>> x, history = torch.tensor([2.0]), []
            >>> for i, timestep in enumerate(solver.timesteps):
            ...     history.append(torch.tensor([float(timestep) / 500]))  # noise minus data, as a network says
            ...     x = solver.step(x, history, i)
            >>> x
            tensor([0.7500])
        """
        state_weight, weights = self.update_weights(index, len(history))
        return weighted_sum(sample, state_weight, history, weights)

    def update_weights(self, index: int, count: int) -> tuple[float, tuple[float, ...]]:
        """The weights of x and of the last `count` predictions, oldest first, in the update of [`step`]."""
        state_weight, weights = self._weights[index]
        missing = index + 1 - count
        return state_weight, (sum(weights[: missing + 1]), *weights[missing + 1 :])

    def update_table(self, prediction_type: str) -> torch.Tensor:
        """
        Every number of a run as one tensor, for [`tensor_step`].

        Returns:
            `torch.Tensor`, shape (N, N + 3), float64: Row i is u, w, a, b_0 ... b_(N-1) of step i.
        """
        table = np.zeros((self.num_steps, self.num_steps + 3))
        for i, (state_weight, weights) in enumerate(self._weights):
            table[i, : i + 4] = *self.conversion(i, prediction_type), state_weight, *weights
        return torch.from_numpy(table)

    def reach(self, prediction_type: str) -> float:
        """
        How far a run can get from zero if the noise and all outputs of the network are between -1 and 1.

            reach = max over states and predictions y of sum_k |A_k|,   y = A_0 * noise + sum_k A_(k+1) * m_k

        Args:
            prediction_type (`str`): What the outputs m_k are.

        Returns:
            `float`: At least 1; infinite or nan if the table overflows.

        Raises:
            ValueError: If an output says nothing of the frame's prediction at a node.
        """
        n, table = self.num_steps, self.update_table(prediction_type)
        units, indices = torch.from_numpy(np.eye(n + 1)), torch.from_numpy(np.arange(n))
        state, history, sizes = units[0], torch.zeros_like(units[1:]), [units[0, 0]]
        for i in range(n):
            state, history = tensor_step(state, units[i + 1], history, indices[i : i + 1], table)
            sizes += [history[i].abs().sum(), state.abs().sum()]
        return float(torch.stack(sizes).max())

    def in_frame(self, frame: str) -> "SearchedSolver":
        """
        The same solver with predictions of another kind: every run is the same but for rounding.

        Args:
            frame (`str`): "velocity" or "data".

        Raises:
            ValueError: If a row does not sum to one; only consistent tables have another frame.
        """
        if frame == self.frame:
            return self
        check_coefficients(replace(self, consistent=True))
        n, units = self.num_steps, torch.from_numpy(np.eye(self.num_steps + 1))
        source, target = FRAME_PREDICTIONS[frame], FRAME_PREDICTIONS[self.frame]
        states, history = [units[0]], []
        for i in range(n):
            history.append(self._convert(units[i + 1], states[i], i, source, target))
            states.append(self.step(states[i], history, i))
        return SearchedSolver.from_states(self.timesteps, self.alphas, self.sigmas, torch.stack(states), frame, True)

    @classmethod
    def from_states(cls, timesteps, alphas, sigmas, states, frame: str, consistent: bool = False) -> "SearchedSolver":
        """
        The table of a run that is known by its states' coefficients.

        Args:
            timesteps, alphas, sigmas, frame, consistent: As in the class.
            states (array, shape (N+1, N+1)): A_i, B_i0 ... B_i(N-1) of x_i = A_i * noise + sum_{j < i} B_ij * p_j.
        """
        k, m = _frame_scales(np.asarray(alphas, np.float64), np.asarray(sigmas, np.float64), frame)
        states = np.asarray(states, np.float64)
        ratios = k[1:] / k[:-1]
        rows = (states[1:] - ratios[:, None] * states[:-1])[:, 1:]
        coefficients = np.tril(rows / (m[1:] - ratios * m[:-1])[:, None])
        return cls(timesteps, alphas, sigmas, coefficients, frame, consistent)

    @classmethod
    def adams_bashforth(cls, timesteps, alphas, sigmas, frame: str, order: int) -> "SearchedSolver":
        """
        The variable-step Adams-Bashforth table on given nodes, which ramps up from order one.

            c_ij = integral of L_ij(s) ds from tau_i to tau_{i+1}, over (tau_{i+1} - tau_i),   tau = m / k

        where L_ij are the Lagrange polynomials of the last min(order, i+1) nodes, in the frame's own time: tau is
        sigma / (alpha + sigma) for velocities (the flow time) and alpha / sigma for data.

        Order 1 is Euler's method on the flow (`frame="velocity"`) and DDIM (`frame="data"`). Order 2 in the data frame
        is of DPM-Solver++(2M)'s family: both integrate the data prediction exactly in alpha / sigma = exp(lambda);
        this table extrapolates it linearly in exp(lambda), c = (1 + h/2g, -h/2g) with steps h after g in exp(lambda),
        DPM-Solver++(2M) takes the same two numbers with the steps in lambda. A data-frame step into sigma = 0 has no
        finite length and is taken with order 1, as DPM-Solver++ does.

        Args:
            timesteps, alphas, sigmas, frame: As in the class.
            order (`int`): 1 to 4 are usual.

        Source: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", III.5; Lu et al.,
        "DPM-Solver++", arXiv 2211.01095.
        """
        alphas, sigmas = np.asarray(alphas, np.float64), np.asarray(sigmas, np.float64)
        check_nodes(alphas, sigmas)
        scales, signals = _frame_scales(alphas, sigmas, frame)
        num_steps = len(timesteps)
        coefficients = np.zeros((num_steps, num_steps))
        for i in range(num_steps):
            first = i if scales[i + 1] == 0 else max(0, i + 1 - order)
            if first == i:
                coefficients[i, i] = 1
                continue
            times = signals[first : i + 2] / scales[first : i + 2]
            times = (times - times[-2]) / (times[-1] - times[-2])
            coefficients[i, first : i + 1] = integrated_lagrange(times[:-1])
        return cls(timesteps, alphas, sigmas, coefficients, frame)


def tensor_step(
    sample: torch.Tensor, model_output: torch.Tensor, history: torch.Tensor, index: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Convert an output and advance, as a pure function of tensors: one graph serves all steps of all solvers of N steps,
    so a whole loop can go through `torch.compile` or into a CUDA graph.

        p_i = u_i * x + w_i * m,    x' = a_i * x + sum_j b_ij * p_j

    Args:
        sample, model_output (`torch.Tensor`): x and m, of one shape.
        history (`torch.Tensor`, shape (N, *sample.shape)): p_0 ... p_(i-1) and zeros; all zeros before the first step.
        index (`torch.Tensor`, shape (1,), int64): i.
        table (`torch.Tensor`, shape (N, N + 3)): [`SearchedSolver.update_table`], in the dtype of the arithmetic and
            of `history`, on the sample's device.

    Returns:
        x' in the sample's dtype, and the history with p_i.
    """
    row = table.index_select(0, index)[0]
    x = sample.to(table.dtype)
    history = history.index_copy(0, index, (row[0] * x + row[1] * model_output)[None])
    with exact_products(x.device):
        return (row[2] * x + torch.tensordot(row[3:], history, dims=1)).to(sample.dtype), history


def exact_products(device: torch.device) -> AbstractContextManager:
    """Where matrix products are not rounded to half precision, as `torch.autocast` would."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def weighted_sum(
    sample: torch.Tensor, scale: float, tensors: Sequence[torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """scale * sample + sum_j weights_j * tensors_j, accumulated in at least float32, with no pass over memory more."""
    sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
    terms = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight]
    if scale == 1 and terms:
        tensor, weight = terms.pop(0)
        result = torch.add(sample, tensor, alpha=weight)
    else:
        result = sample * scale
    for tensor, weight in terms:
        result.add_(tensor, alpha=weight)
    return result


def integrated_lagrange(times: np.ndarray) -> np.ndarray:
    """Integrals from 0 to 1 of the Lagrange polynomials on `times`."""
    weights = []
    for j, time in enumerate(times):
        others = np.delete(times, j)
        polynomial = Polynomial.fromroots(others) / np.prod(time - others)
        weights.append(polynomial.integ()(1.0))
    return np.array(weights)


def _frame_scales(alphas: np.ndarray, sigmas: np.ndarray, frame: str) -> tuple[np.ndarray, np.ndarray]:
    """k and m of the update: x / k moves along p at the rate of m / k."""
    return (sigmas, alphas) if frame == "data" else (alphas + sigmas, sigmas)


def _update_weights(solver: SearchedSolver) -> tuple[tuple[float, tuple[float, ...]], ...]:
    """For each step the weight of x and those of the predictions, as Python floats: they cost a GPU no transfer."""
    k, m = _frame_scales(solver.alphas, solver.sigmas, solver.frame)
    state_weights = k[1:] / k[:-1]
    lengths = m[1:] - state_weights * m[:-1]
    rows = lengths[:, None] * solver.coefficients
    return tuple((float(state_weights[i]), tuple(rows[i, : i + 1].tolist())) for i in range(solver.num_steps))
