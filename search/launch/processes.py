"""Batches over the processes of `accelerate launch`: dealt out, and their small results brought back in one order."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


class LostProcessError(RuntimeError):
    """Another process of the search has ended, so what it has of the samples is missing."""


def share(items: Sequence, first: int = 0) -> list:
    """
    This process's part of `items`: every P-th of them.

    Args:
        first (`int`): How many have been dealt out before, so that the next is another process's turn.
    """
    state = PartialState()
    return list(items[(state.process_index - first) % state.num_processes :: state.num_processes])


def gather(batches: Sequence, values: Sequence) -> list:
    """
    One small value of each batch of all processes, in the order of `batch.index`.

    What is summed from them has the same bits on any number of processes.

    Args:
        batches (sequence of `Batch`): This process's.
        values: One for each of them, on the CPU.
    """
    pairs = [(batch.index, value) for batch, value in zip(batches, values, strict=True)]
    return [value for _, value in sorted(everyone(pairs), key=lambda pair: pair[0])]


def in_order(stream: Iterator[list], num_parts: int, describe: Callable[[Any], Any]) -> Iterator:
    """
    What is said of all processes' parts of some work, in the order of `part.index`; one part of each is in memory.

    Args:
        stream: This process's parts, or several where one was too large.
        num_parts (`int`): Of all processes.
        describe: Says something small of a part.
    """
    for _ in range(-(-num_parts // PartialState().num_processes)):
        parts = next(stream, [])
        yield from gather(parts, [describe(part) for part in parts])


def total(count: int) -> int:
    """The sum over processes."""
    return sum(everyone([count]))


def agree(value: Any) -> Any:
    """The main process's value."""
    values = [value]
    with _others():
        broadcast_object_list(values)
    return values[0]


def quiet() -> bool | None:
    """Whether a progress bar is off: on all processes but the main one, and there if its output is no terminal."""
    return None if PartialState().is_main_process else True


def everyone(values: list) -> list:
    """The values of all processes."""
    # Alone, accelerate would hand back the list itself or ask for a process group, depending on its version.
    if PartialState().num_processes == 1:
        return values
    with _others():
        return gather_object(values)


@contextmanager
def _others() -> Iterator[None]:
    """An error that says so if another process is gone; one that is this process's own stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcessError("Another process of the search has ended; it may have said why.") from error
