"""Journal: what a search has computed so far, on disk, so that it can go on after it was killed."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate import PartialState

from diffusers_searched_solver.serialization import write_whole

from .network_calls import NetworkCalls
from .processes import agree, total


class Journal:
    """
    The outcomes of a search's pieces of work, in order.

    A search is deterministic, so one that begins again and is handed the outcomes of the work that was done before
    goes on bit for bit as if it had never been interrupted. Every outcome is on disk before the next work begins.

    Args:
        calls (`NetworkCalls`): Counts what this process spends.
        path (`Path`, *optional*): Where the main process writes. A journal without one is forgotten.
        settings (`Mapping`): What the outcomes depend on; JSON.
        resume (`bool`): Whether to go on with what is at `path`.

    Attributes:
        spent (`int`): Network calls of all processes for the outcomes so far, earlier runs included.

    Raises:
        ValueError: If there is a journal but it was not to be resumed, it is damaged, or it is of other settings; if
            none can be written.
    """

    def __init__(self, calls: NetworkCalls, path: Path | None = None, settings: Mapping = {}, resume: bool = False):  # noqa: B006
        self._calls, self._path, self._settings = calls, path, dict(settings)
        self._entries: list[dict] = []
        if path is not None:
            self._entries = agree(self._read(resume) if PartialState().is_main_process else None)
        self._next = 0
        self.spent = 0

    def _read(self, resume: bool) -> list[dict]:
        folder = next(parent for parent in self._path.parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise ValueError(f"Nothing can be written in '{folder}'. Choose another --output-dir.")
        for aside in self._path.parent.glob(f".{self._path.name}.*"):
            aside.unlink()  # of a process that was killed as it wrote
        if not self._path.exists():
            return []
        if not resume:
            raise ValueError(
                f"'{self._path}' is the journal of a search that did not finish. Pass --resume to go on with it, or "
                "delete it to begin again."
            )
        try:
            found = json.loads(self._path.read_text())
            settings, entries = found["settings"], found["entries"]
            if found["sha256"] != _digest(settings, entries):
                raise ValueError("its checksum is another")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"'{self._path}' is no journal of a search, or damaged ({error}). Delete it to begin again."
            ) from error
        changed = sorted(
            key for key in {*settings, *self._settings} if settings.get(key) != _as_json(self._settings.get(key))
        )
        if changed:
            raise ValueError(
                f"The search in '{self._path}' was begun with other settings: "
                + "; ".join(f"{key} was {settings.get(key)!r}, is {self._settings.get(key)!r}" for key in changed)
                + ". Go on with the old ones, or choose another --output-dir."
            )
        return entries

    def remember(self, compute: Callable[[], object]) -> object:
        """
        The outcome of the search's next piece of work: read, or else computed and written.

        Args:
            compute: Makes the outcome, the same JSON on all processes.
        """
        if self._next == len(self._entries):
            before = self._calls.count
            outcome = compute()
            self._entries.append({"calls": total(self._calls.count - before), "outcome": outcome})
            self._write()
        entry = self._entries[self._next]
        self._next += 1
        self.spent += entry["calls"]
        return entry["outcome"]

    def _write(self):
        if self._path is not None and PartialState().is_main_process:
            content = {"settings": self._settings, "entries": self._entries}
            write_whole(self._path, json.dumps({"sha256": _digest(**content), **content}).encode())

    def check(self, fingerprint: str):
        """
        Make sure that what is to go on is what was begun.

        Args:
            fingerprint: Of what the settings do not tell: weights, noise, the teacher's end points.

        Raises:
            ValueError: If it is another than at the beginning.
        """
        if self.remember(lambda: fingerprint) != fingerprint:
            raise ValueError(
                f"The search in '{self._path}' was begun with another network, or on another kind of machine: it "
                "does not compute the same. Go on with the old one, or choose another --output-dir."
            )

    def delete(self):
        """The search is finished."""
        if self._path is not None and PartialState().is_main_process:
            self._path.unlink(missing_ok=True)


def _digest(settings: Mapping, entries: Sequence[Mapping]) -> str:
    return hashlib.sha256(json.dumps([settings, entries]).encode()).hexdigest()


def _as_json(value):
    """As it would come back from disk."""
    return json.loads(json.dumps(value))
