"""What the paper's recipe searches: step sizes by softmax and coefficients whose rows sum to one, with gradients."""

import numpy as np
import torch

from diffusers_searched_solver import NoiseProcess, SearchedSolver
from diffusers_searched_solver.process import FRAME_PREDICTIONS, convert_prediction


# Up to so many steps, the last steps are of second order.
FEW_STEPS = 6
SECOND_ORDER_STEPS = 2
# Half of the central difference that alpha and sigma are differentiated with, in timesteps.
HALF_DIFFERENCE = 1e-3


class ConsistentFamily:
    """
    Consistent solvers of N steps whose network times are those of their nodes, as a vector without constraints.

        vector = (r, c_ij for j < i):   tau_i = T * (1 - sum_{k < i} softmax(r)_k),   c_ii = 1 - sum_{j < i} c_ij

    where the node after the last step is the data, alpha = 1 and sigma = 0. Coefficients combine velocities on flow
    matching and data predictions on variance-preserving processes, the paper's two families. If N <= 6, the last two
    steps are of second order: of their coefficients only c_{i, i-1} is free.

    Args:
        process (`NoiseProcess`): T is its `max_timestep`.
        num_steps (`int`): N, at least 2.

    Source: Wang et al., "Differentiable Solver Search for Fast Diffusion Sampling", arXiv 2505.21114, section 4.
    """

    def __init__(self, process: NoiseProcess, num_steps: int):
        self.process, self.num_steps = process, num_steps
        self.frame = "velocity" if process.kind == "flow_matching" else "data"
        rows, columns = np.tril_indices(num_steps, -1)
        if num_steps <= FEW_STEPS:
            free = (rows < num_steps - SECOND_ORDER_STEPS) | (columns == rows - 1)
            rows, columns = rows[free], columns[free]
        self._places = torch.from_numpy(rows), torch.from_numpy(columns)

    def start(self) -> torch.Tensor:
        """Equal steps of Euler's method or of DDIM: r = 1, c = 0."""
        start = np.concatenate([np.ones(self.num_steps), np.zeros(len(self._places[0]))])
        return torch.from_numpy(start)

    def timesteps(self, vector: torch.Tensor) -> torch.Tensor:
        """tau of a vector, shape (N,), float64."""
        elapsed = vector[: self.num_steps].softmax(0).cumsum(0)[:-1]
        return self.process.max_timestep * (1 - torch.cat([elapsed.new_zeros(1), elapsed]))

    def table(self, vector: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """
        [`SearchedSolver.update_table`] of the vector's solver, with gradients.

        Args:
            vector (`torch.Tensor`): On the CPU, float64.
            prediction_type (`str`): What the network's outputs are.

        Returns:
            `torch.Tensor`, shape (N, N + 3), float64: u, w, a, b_0 ... b_(N-1) of each step.
        """
        alpha, sigma = self._nodes(vector)
        k, m = (sigma, alpha) if self.frame == "data" else (alpha + sigma, sigma)
        a = k[1:] / k[:-1]
        b = (m[1:] - a * m[:-1])[:, None] * self._coefficients(vector)
        levels = zip(alpha[:-1], sigma[:-1], strict=True)
        uw = [convert_prediction(prediction_type, FRAME_PREDICTIONS[self.frame], *level) for level in levels]
        return torch.cat([torch.stack([torch.stack(pair) for pair in uw]), a[:, None], b], 1)

    def solver(self, vector: torch.Tensor) -> SearchedSolver:
        """The vector's solver."""
        tables = (self.timesteps(vector), *self._nodes(vector), self._coefficients(vector))
        return SearchedSolver(*(table.detach().numpy() for table in tables), self.frame)

    def _coefficients(self, vector: torch.Tensor) -> torch.Tensor:
        below = vector.new_zeros(self.num_steps, self.num_steps).index_put(self._places, vector[self.num_steps :])
        return below + torch.diag(1 - below.sum(1))

    def _nodes(self, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma of the N + 1 nodes."""
        timesteps = self.timesteps(vector)
        now = timesteps.detach().numpy()
        before, at, after = (np.stack(self.process.alpha_sigma(now + h * HALF_DIFFERENCE)) for h in (-1, 0, 1))
        slopes = torch.from_numpy((after - before) / (2 * HALF_DIFFERENCE))
        alpha, sigma = torch.from_numpy(at) + slopes * (timesteps - timesteps.detach())
        return torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)])
