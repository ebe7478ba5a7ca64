"""A run of a solver under a scheduler: where it stands, and the predictions so far."""

import math
import threading

import torch

from .history import History
from .solver import SearchedSolver


class Run:
    """
    A run of a solver from `set_timesteps` on. A step that has begun touches its own run alone, whatever other threads
    begin meanwhile.

    Args:
        before (`Run`, *optional*): The scheduler's last one.

    Attributes:
        step_index (`int`, *optional*): The step that comes next; None before the first.
        history (`History`, *optional*): The predictions so far; None before the first step and after the last.
    """

    def __init__(self, solver: SearchedSolver, timesteps: torch.Tensor, before: "Run | None"):
        self.solver, self._timesteps = solver, timesteps
        self._threads, self._displaced = {threading.get_ident()}, set()
        if before is not None:
            unfinished = before._threads if before.step_index != before.solver.num_steps else set()
            self._displaced = (before._displaced | unfinished) - self._threads
        self.step_index: int | None = None
        self.history: History | None = None

    def place(self, timestep) -> int | None:
        """Which element of the schedule's tensor a timestep is, if it is that itself and not a copy."""
        if not torch.is_tensor(timestep) or timestep.ndim:
            return None
        same = timestep.untyped_storage().data_ptr() == self._timesteps.untyped_storage().data_ptr()
        return timestep.storage_offset() if same else None

    def check_thread(self):
        """Refuse what a thread does whose own run this one has displaced."""
        if threading.get_ident() in self._displaced:
            raise RuntimeError(
                "Another thread has begun a run with this scheduler, which holds the predictions of one. Give each "
                "thread a pipeline of its own, with a copy of the scheduler (`copy.deepcopy`)."
            )

    def advance(self, output: torch.Tensor, sample: torch.Tensor, index: int, prediction_type: str) -> torch.Tensor:
        """Take step `index` from the network's output and the state that it was called on, to the next state."""
        history = History(self.solver, prediction_type, index) if self.step_index is None else self.history
        history.append(output, sample)
        result = history.step(sample)
        self.step_index = index + 1
        self.history = history if self.step_index < self.solver.num_steps else None
        return result

    def index_of(self, timestep: float | torch.Tensor) -> int:
        """
        The step whose timestep is nearest to `timestep`.

        Raises:
            ValueError: If it is not a number.
        """
        place = self.place(timestep)
        if place is not None:
            return place
        if math.isnan(timestep):
            raise ValueError("`timestep` is nan, expected an element of `timesteps`.")
        return int(abs(self.solver.timesteps - float(timestep)).argmin())

    def due(self, timestep: float | torch.Tensor, begin_index: int | None) -> int:
        """
        The index of the step that is due.

        Args:
            timestep: What `step` was called with.
            begin_index: Where the run starts, if a pipeline has said so.

        Raises:
            RuntimeError: If another step is asked for than is due, none is, or a thread asks whose run was displaced.
        """
        place = self.place(timestep)
        if place is None:
            self.check_thread()
        self._threads.add(threading.get_ident())
        index, num_steps = self.step_index, self.solver.num_steps
        if index is None:
            return self.index_of(timestep) if begin_index is None else begin_index
        if index >= num_steps:
            raise RuntimeError(
                f"`step` was called {index + 1} times in a run of {num_steps} steps. Call `set_timesteps` to begin "
                "another run."
            )
        if place is not None and place != index:
            raise RuntimeError(
                f"`step` was called with timestep {place} of the schedule where timestep {index} is due: each step "
                "needs the predictions of those before. Call `set_timesteps` to begin another run."
            )
        return index
