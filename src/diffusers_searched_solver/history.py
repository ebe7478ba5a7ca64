"""A run's predictions in memory of its own, and the update from them."""

from collections.abc import Sequence

import torch

from .solver import SearchedSolver, exact_products, weighted_sum


# From so many terms on, one matrix product is faster than additions one after another.
PRODUCT_TERMS = 4


class History(Sequence):
    """
    The predictions of a run of a solver that its steps to come need, oldest first.

    Networks use the memory of their outputs again (CUDA graphs, `torch.compile(mode="reduce-overhead")`), so each
    prediction is written into a row of the run's own as soon as it is made. The rows are a ring: a new prediction
    takes the place of one that no step needs any more.

    Args:
        solver (`SearchedSolver`): Whose run it is.
        prediction_type (`str`): What the network's outputs are, one of `process.PREDICTION_TYPES`.
        begin (`int`): The step that the run begins with.
    """

    def __init__(self, solver: SearchedSolver, prediction_type: str, begin: int = 0):
        self._solver, self._prediction_type, self._begin = solver, prediction_type, begin
        steps = [solver.update_weights(i, i + 1 - begin) for i in range(begin, solver.num_steps)]
        self._scales, self._weights = [scale for scale, _ in steps], [weights for _, weights in steps]
        self._depth = _depth(self._weights)
        self._count = 0
        # (depth, *sample.shape), at least float32; a list where others were put in place of predictions.
        self._rows: torch.Tensor | list[torch.Tensor] = []
        self._table: torch.Tensor | None = None  # (steps, depth), each row's weights, beside the rows

    def __len__(self) -> int:
        return min(self._count, self._depth)

    def __getitem__(self, index):
        return [self._rows[k % self._depth] for k in range(self._count - len(self), self._count)][index]

    def __setitem__(self, index: int, prediction: torch.Tensor):
        """Put another in place of a prediction, as ChronoEdit does, which drops frames mid-way."""
        slot = (self._count - len(self) + range(len(self))[index]) % self._depth
        self._rows = [*self._rows]
        self._rows[slot] = prediction

    def append(self, model_output: torch.Tensor, sample: torch.Tensor):
        """
        Write down the prediction of the step that is due.

        Args:
            model_output, sample (`torch.Tensor`): The network's output and the state that it was called on, of one
                shape.

        Raises:
            ValueError: If the samples of the run were of another shape before.
        """
        u, w = self._solver.conversion(self._begin + self._count, self._prediction_type)
        row = self._next_row(sample)
        if u == 0 and w == 1:
            row.copy_(model_output)
        elif torch.is_grad_enabled():
            row.copy_(weighted_sum(sample, u, [model_output], [w]))
        else:
            torch.mul(sample.to(row.dtype), u, out=row).add_(model_output, alpha=w)

    def extend(self, predictions: Sequence[torch.Tensor]):
        """Write down what another run has predicted in the steps that are due, in the solver's frame."""
        for prediction in predictions:
            self._next_row(prediction).copy_(prediction)

    @property
    def keeps_all(self) -> bool:
        """Whether no prediction of the run takes the place of another."""
        return self._depth == len(self._weights)

    def _next_row(self, sample: torch.Tensor) -> torch.Tensor:
        dtype, rows = torch.promote_types(sample.dtype, torch.float32), self._rows
        if not torch.is_tensor(rows) or rows.dtype != dtype or rows.shape[1:] != sample.shape:
            self._allocate(sample, dtype)
        self._count += 1
        return self._rows[(self._count - 1) % self._depth]

    def _allocate(self, sample: torch.Tensor, dtype: torch.dtype):
        rows = sample.new_empty((self._depth, *sample.shape), dtype=dtype)
        for slot, old in enumerate(self._rows[: self._count]):
            if old.shape != sample.shape:
                raise ValueError(
                    f"`sample` has shape {tuple(sample.shape)}, but the run began with shape {tuple(old.shape)}, "
                    "which its predictions have. Go on with samples of that shape, or call `set_timesteps` to begin "
                    "another run."
                )
            rows[slot].copy_(old)
        self._rows = rows

    def step(self, sample: torch.Tensor) -> torch.Tensor:
        """
        Advance the sample that the last prediction was made on to the next node.

        Returns:
            `torch.Tensor`: As of [`SearchedSolver.step`].
        """
        step, count, x = self._count - 1, len(self), sample.to(self._rows.dtype)
        scale, weights = self._scales[step], self._weights[step][-count:]
        if len(weights) - weights.count(0) < PRODUCT_TERMS or not x.is_contiguous():
            return weighted_sum(x, scale, self, weights)
        if self._table is None or self._table.dtype != x.dtype:
            self._table = self._weights_of_rows().to(x.device, x.dtype, non_blocking=True)
        rows = self._rows[:count].view(count, -1)
        with exact_products(x.device):
            return torch.addmv(x.view(-1), rows.t(), self._table[step, :count], beta=scale).view(x.shape)

    def _weights_of_rows(self) -> torch.Tensor:
        table = torch.zeros(len(self._weights), self._depth, dtype=torch.float64, device="cpu")
        for step, weights in enumerate(self._weights):
            for k in range(max(0, step + 1 - self._depth), step + 1):
                table[step, k % self._depth] = weights[k]
        return table


def _depth(weights: Sequence[Sequence[float]]) -> int:
    """How many predictions some step and those after it need at most."""
    depth, oldest = 1, len(weights)
    for step in range(len(weights) - 1, -1, -1):
        oldest = min(oldest, step, *(k for k, weight in enumerate(weights[step]) if weight))
        depth = max(depth, step + 1 - oldest)
    return depth
