"""What a search may change: node times, coefficients on top of classical ones that follow the nodes, network times."""

from dataclasses import dataclass

import numpy as np

from diffusers_searched_solver import NoiseProcess, SearchedSolver


FRAME = "velocity"
# A first node at the very beginning of the process would be a gap of zero, whose logarithm is minus infinity.
FIRST_GAP = 0.02
# Two network calls at nearly one time would differ by noise alone, which large coefficients then amplify on other
# samples. So gaps between calls are at least this share of those of a uniform grid.
GAP_SHARE = 0.1
# A difference quotient is best when a change grows with the square root of the rounding error. Up to this one, the
# changes below are large enough; more than this many times as large, nodes would meet.
EXACT, LARGEST_FACTOR = 1e-4, 10.0


@dataclass(frozen=True)
class Entry:
    """
    One number of a table, and where a run feels it first.

    Args:
        index (`int`): Its place among the entries.
        step (`int`): The first step whose outcome depends on it.
        known (`int`): How many predictions do not depend on it: p_0 ... p_(known-1).
        change (`float`): A change that is small, but whose effect is large against rounding.
    """

    index: int
    step: int
    known: int
    change: float


class SolverFamily:
    """
    Solvers of N steps in the velocity frame, as a vector without constraints.

        entries = (d, tau, o):  nodes at the times tau,  timesteps = tau + o,  coefficients = AB(nodes) + d
        vector  = (d, z, o):    tau_i = T * sum_{k > i} g_k,  g = f + (1 - sum f) * softmax(z),  k = 0 ... N

    where f is a least gap between calls and AB is the Adams-Bashforth table of the nodes. Because it follows them,
    moving a node is worth about what it would be worth in a classical solver, instead of spoiling coefficients that
    were made for other nodes (the authors of "GAS", arXiv 2510.17699, found this of corrections to DPM-Solver++). Row
    sums are free.

    A flow-matching run begins at pure noise whatever the first network time. If the network predicts velocities, the
    nodes matter only through the coefficients and d already frees those, so o would be redundant and stays 0.

    Args:
        process (`NoiseProcess`): T is its `max_timestep`.
        num_steps (`int`): N.
        order (`int`): Of the Adams-Bashforth table.
        offsets (`bool`): Whether o is searched.
        rounding (`float`): `rounding_error` of the predictions.

    Source: for searched coefficients and step sizes by softmax, Wang et al., arXiv 2505.21114.
    """

    def __init__(self, process: NoiseProcess, num_steps: int, order: int, offsets: bool, rounding: float = 0.0):
        self.process, self.num_steps, self.order, self.offsets = process, num_steps, order, offsets
        self._change = float(np.clip(np.sqrt(rounding / EXACT), 1.0, LARGEST_FACTOR))
        self.rows, self.columns = np.tril_indices(num_steps)
        self._splits = [len(self.rows), len(self.rows) + num_steps]
        self._floor = np.full(num_steps + 1, GAP_SHARE / (num_steps + 1))
        self._floor[0] = 0

    def vector(self, timesteps: np.ndarray) -> np.ndarray:
        """The classical solver on a grid, whose first node moves a little if it is the beginning of the process."""
        bounds = np.concatenate([[self.process.max_timestep], timesteps, [0]]) / self.process.max_timestep
        gaps = -np.diff(bounds)
        gaps[0] = max(gaps[0], FIRST_GAP)
        free = np.maximum(gaps / gaps.sum() - self._floor, 0.1 * self._floor[1])
        return np.concatenate([np.zeros(len(self.rows)), np.log(free / free.sum()), np.zeros(self.num_steps)])

    def entries(self, vector: np.ndarray) -> np.ndarray:
        """(d, tau, o) of a vector."""
        d, z, o = np.split(vector, [self._splits[0], self._splits[1] + 1])
        gaps = self._floor + (1 - self._floor.sum()) * _softmax(z)
        return np.concatenate([d, self.process.max_timestep * (1 - np.cumsum(gaps)[:-1]), o])

    def entry_jacobian(self, vector: np.ndarray) -> np.ndarray:
        """d entries / d vector."""
        n, k = self.num_steps, self._splits[0]
        shares = _softmax(vector[k : k + n + 1])
        below = np.arange(n + 1)[None, :] > np.arange(n)[:, None]
        free = self.process.max_timestep * (1 - self._floor.sum())
        jacobian = np.zeros((k + 2 * n, k + 2 * n + 1))
        jacobian[:k, :k] = np.eye(k)
        jacobian[k : k + n, k : k + n + 1] = free * shares * (below - (below * shares).sum(1, keepdims=True))
        jacobian[k + n :, k + n + 1 :] = np.eye(n)
        return jacobian

    def solver(self, entries: np.ndarray) -> SearchedSolver:
        """
        The solver of some entries.

        Raises:
            ValueError: If they are none, for instance because two timesteps change places.
        """
        d, tau, o = np.split(entries, self._splits)
        alphas, sigmas = self.process.alpha_sigma(tau)
        if self.process.kind == "flow_matching":
            alphas[0], sigmas[0] = 0.0, 1.0
        alphas, sigmas = np.append(alphas, 1.0), np.append(sigmas, 0.0)
        classical = SearchedSolver.adams_bashforth(tau, alphas, sigmas, FRAME, self.order)
        coefficients = np.array(classical.coefficients)
        coefficients[self.rows, self.columns] += d
        return SearchedSolver(tau + o, alphas, sigmas, coefficients, FRAME, consistent=False)

    def searched(self, entries: np.ndarray, times_only: bool) -> list[Entry]:
        """The entries that a search changes: the node times only, or everything."""
        tau = np.split(entries, self._splits)[1]
        moves = -0.05 * self._change * (tau - np.append(tau[1:], 0))
        first = self._splits[0]
        # Node i is where step i - 1 ends.
        nodes = [Entry(first + i, max(i - 1, 0), i, moves[i]) for i in range(self.num_steps)]
        if times_only:
            return nodes
        coefficients = [Entry(k, int(i), int(i) + 1, 0.02 * self._change) for k, i in enumerate(self.rows)]
        if not self.offsets:
            return coefficients + nodes
        offsets = [Entry(self._splits[1] + i, i, i, moves[i]) for i in range(self.num_steps)]
        return coefficients + nodes + offsets


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()
