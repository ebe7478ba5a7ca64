"""What a search may change: node times, coefficients on top of classical ones that follow the nodes, network times."""

from dataclasses import dataclass

import numpy as np

from diffusers_searched_solver import NoiseProcess, SearchedSolver
from diffusers_searched_solver.serialization import LATEST_CALL


FRAME = "velocity"
ORDER = 3
# How far beyond its beginning and its end the gaps of a process are counted, as a share of it: a node that is at an
# end has a gap there too, whose logarithm can be moved.
MARGIN = 0.02
# Two network calls at nearly one time would differ by noise alone, which large coefficients then amplify on other
# samples. So gaps stay above this share of those of a uniform grid, or half of what the known solver has.
GAP_SHARE = 0.1
# Where the linear model is worth something: a step moves no gap by more than this factor, no network time by more than
# this share of a gap and no coefficient by more than this.
MAX_STRETCH, MAX_OFFSET, MAX_CORRECTION = 5.0, 2.0, 10.0
# How much of a step's damping is relative to what coefficients do alone, where differences are trusted.
ALONE = 0.1
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
    Solvers of N steps around a known one, in the velocity frame, as a vector without constraints.

        entries = (d, tau, o):  nodes at the times tau,  timesteps = tau + o,  coefficients = AB(nodes) + d
        vector  = (d, z, o):    tau_i = T * (1 + m - (1 + 2m) * sum_{k <= i} g_k),   g = f + (1 - sum f) * softmax(z)

    where k = 0 ... N are the gaps between the beginning, the nodes and the end, m is a margin at both ends within
    which tau is the end, f a least gap, and AB the Adams-Bashforth table of the nodes. Because it follows them, moving
    a node is worth about what it would be worth in a classical solver, instead of spoiling coefficients that were made
    for other nodes (the authors of "GAS", arXiv 2510.17699, found this of corrections to DPM-Solver++). Row sums are
    free.

    A flow-matching run begins at pure noise whatever the first network time. If the network predicts velocities, the
    nodes matter only through the coefficients and d already frees those, so o would be redundant and stays as it is.

    Args:
        process (`NoiseProcess`): T is its `max_timestep`.
        known (`SearchedSolver`): What `start` is the vector of, but for nodes off the process: the family's are on it,
            and it ends at the data.
        offsets (`bool`): Whether o is searched.
        rounding (`float`): `rounding_error` of the predictions.
        differences (`bool`): Whether `damping` is of differences of predictions too.

    Source: for searched coefficients and step sizes by softmax, Wang et al., arXiv 2505.21114.
    """

    def __init__(
        self,
        process: NoiseProcess,
        known: SearchedSolver,
        offsets: bool,
        rounding: float = 0.0,
        differences: bool = True,
    ):
        self.process, self.num_steps, self.offsets, self.differences = process, known.num_steps, offsets, differences
        known = known.in_frame(FRAME)
        self._change = float(np.clip(np.sqrt(rounding / EXACT), 1.0, LARGEST_FACTOR))
        self.rows, self.columns = np.tril_indices(self.num_steps)
        self._splits = [len(self.rows), len(self.rows) + self.num_steps]
        self._first = (float(known.alphas[0]), float(known.sigmas[0])) if process.kind == "flow_matching" else None
        tau = process.timesteps(known.alphas, known.sigmas)[:-1]
        if self._first:
            # The first node stays; its time is the network's alone.
            tau[0] = min(known.timesteps[0], process.max_timestep)
        gaps = self._gaps(tau)
        self._floor = np.minimum(GAP_SHARE / (self.num_steps + 1), gaps / 2)
        free = gaps - self._floor
        z = np.log(free / free.sum())
        classical = self._classical(tau)
        d = (known.coefficients - classical.coefficients)[self.rows, self.columns]
        self.start = np.concatenate([d, z, known.timesteps - tau])

    def _gaps(self, tau: np.ndarray) -> np.ndarray:
        bounds = np.concatenate([[1 + MARGIN], tau / self.process.max_timestep, [-MARGIN]])
        return -np.diff(bounds) / (1 + 2 * MARGIN)

    def entries(self, vector: np.ndarray) -> np.ndarray:
        """(d, tau, o) of a vector."""
        d, z, o = self._split(vector)
        gaps = self._floor + (1 - self._floor.sum()) * _softmax(z)
        tau = 1 + MARGIN - (1 + 2 * MARGIN) * np.cumsum(gaps)[:-1]
        return np.concatenate([d, self.process.max_timestep * np.clip(tau, 0, 1), o])

    def _split(self, vector: np.ndarray) -> list[np.ndarray]:
        return np.split(vector, [self._splits[0], self._splits[1] + 1])

    def entry_jacobian(self, vector: np.ndarray) -> np.ndarray:
        """d entries / d vector, within the margins as if there were none."""
        n, k = self.num_steps, self._splits[0]
        shares = _softmax(vector[k : k + n + 1])
        below = np.arange(n + 1)[None, :] > np.arange(n)[:, None]
        free = (1 + 2 * MARGIN) * self.process.max_timestep * (1 - self._floor.sum())
        jacobian = np.zeros((k + 2 * n, k + 2 * n + 1))
        jacobian[:k, :k] = np.eye(k)
        jacobian[k : k + n, k : k + n + 1] = free * shares * (below - (below * shares).sum(1, keepdims=True))
        jacobian[k + n :, k + n + 1 :] = np.eye(n)
        return jacobian

    def damping(self, normal: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """
        The matrix that a step is damped by.

        Marquardt's is relative to what each number does by itself. But predictions of neighbouring steps are much
        alike, so moving weight from one to the next does little beside what either coefficient does, and is held back.
        By Abel's summation

            sum_j d_ij p_j = s_ii p_i + sum_{j < i} s_ij (p_j - p_{j+1}),    s_ij = d_i0 + ... + d_ij

        so what is relative to the effects of s is relative to those of differences, and leads farther (digits-sit, 8
        steps: 0.0063 instead of 0.0081). But then directions that hardly matter are hardly damped at all, and the
        solver suffers where predictions differ more: at twice the guidance 0.039 instead of 0.019, at worst 0.068, and
        the best of diffusers has 0.042 there. Both together lead nearly as far and hold (0.0071; 0.024, at worst
        0.032; seven seeds each, three of d alone). Where a few noises are much harder than others, these suffer in any
        case (ztf32, 8 steps: 0.85 instead of 0.59 times UniPC's error), and in bfloat16 differences are rounding
        (digits-sit: 0.0147 instead of 0.0138): there, d alone.

        Args:
            normal (`np.ndarray`, shape (parameters, parameters)): J^T W J.
            parameters (`np.ndarray`): Which numbers of a vector these are.
        """
        alone = np.diag(np.diag(normal))
        if not self.differences:
            return alone
        sums, every = np.eye(len(self.start)), np.zeros((len(self.start), len(self.start)))
        k = len(self.rows)
        sums[:k, :k] = (self.rows == self.rows[:, None]) & (self.columns <= self.columns[:, None])
        every[np.ix_(parameters, parameters)] = normal
        weights = np.linalg.inv(sums)
        of_sums = sums.T @ np.diag(np.diag(weights.T @ every @ weights)) @ sums
        return ALONE * alone + (1 - ALONE) * of_sums[np.ix_(parameters, parameters)]

    @property
    def limits(self) -> np.ndarray:
        """How far a step may move each number of a vector: beyond, a linear model is worth nothing."""
        offset = MAX_OFFSET * self.process.max_timestep / (self.num_steps + 1)
        counts = len(self.rows), self.num_steps + 1, self.num_steps
        return np.repeat([MAX_CORRECTION, np.log(MAX_STRETCH) / 2, offset], counts)

    def solver(self, entries: np.ndarray) -> SearchedSolver:
        """
        The solver of some entries.

        Raises:
            ValueError: If they are none, for instance because two timesteps change places.
        """
        d, tau, o = np.split(entries, self._splits)
        classical = self._classical(tau)
        coefficients = np.array(classical.coefficients)
        coefficients[self.rows, self.columns] += d
        # What a solver file may hold.
        timesteps = np.clip(tau + o, 0, LATEST_CALL * self.process.max_timestep)
        return SearchedSolver(timesteps, classical.alphas, classical.sigmas, coefficients, FRAME, consistent=False)

    def _classical(self, tau: np.ndarray) -> SearchedSolver:
        alphas, sigmas = self.process.alpha_sigma(tau)
        if self._first:
            alphas[0], sigmas[0] = self._first
        times = np.arange(self.num_steps)[::-1]
        return SearchedSolver.adams_bashforth(times, np.append(alphas, 1.0), np.append(sigmas, 0.0), FRAME, ORDER)

    def searched(self, entries: np.ndarray, times_only: bool) -> list[Entry]:
        """The entries that a search changes: the node times only, or everything."""
        tau = np.split(entries, self._splits)[1]
        moves = 0.05 * self._change * np.diff(np.append(tau, 0))
        if tau[-1] == 0:
            moves[-1] = -moves[-2]
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
