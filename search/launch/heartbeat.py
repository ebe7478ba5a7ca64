"""Heartbeats: the processes of a launch notice within minutes that one of them is stuck."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from accelerate import PartialState


# Seconds from one beat to the next, and without one until a process is given up.
BEAT, PATIENCE = 5.0, 180.0
DONE = 10**9


@contextmanager
def peers_watched(advice: str) -> Iterator[None]:
    """
    While inside, end this process if another has not been heard of for `PATIENCE` seconds: a collective operation
    that waits for it cannot be told to stop otherwise. One that ends by itself breaks its connections, which every
    collective operation notices at once.

    Args:
        advice (`str`): What to do then.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    heart = _Heart(state.process_index, state.num_processes, advice)
    try:
        yield
    finally:
        heart.stop()


class _Heart:
    """Beats of this process in the store that the processes have found each other by, and when others were heard."""

    def __init__(self, rank: int, num_processes: int, advice: str):
        self._rank, self._advice, self._ended = rank, advice, threading.Event()
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._heard = {peer: (0, time.monotonic()) for peer in range(num_processes) if peer != rank}
        # The store may be in a process that is stuck, and then so is who asks it.
        for target in (self._beat, self._judge):
            threading.Thread(target=target, daemon=True).start()

    def stop(self):
        """This process needs the others no more, nor they it."""
        self._ended.set()
        with suppress(RuntimeError):
            self._store.add(self._key(self._rank), DONE)

    def _key(self, rank: int) -> str:
        return f"beats of {rank}"

    def _beat(self):
        while not self._ended.wait(BEAT):
            with suppress(RuntimeError):
                self._store.add(self._key(self._rank), 1)
                for peer, (before, _) in self._heard.items():
                    beats = self._store.add(self._key(peer), 0)
                    if beats != before or beats >= DONE:
                        self._heard[peer] = beats, time.monotonic()

    def _judge(self):
        while not self._ended.wait(BEAT):
            now = time.monotonic()
            silent = [peer for peer, (_, heard) in self._heard.items() if now - heard > PATIENCE]
            if silent and not self._ended.is_set():
                print(
                    f"error: Process {silent[0]} has not been heard of for {PATIENCE:.0f} s; it may be stopped, or "
                    f"its machine gone. {self._advice}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
