"""Journal: what a search has computed so far, on disk, so that it can go on after it was killed."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate import PartialState

from .network_calls import NetworkCalls
from .processes import agree, total


class Journal:
    """
    The outcomes of a search's pieces of work, in order.

    A search is deterministic, so one that begins again and is handed the outcomes of the work that was done before
    goes on bit for bit as if it had never been interrupted. Every outcome is on disk, a line of JSON after the digest
    of all until there, before the next work begins; a torn last line is of a process that was killed as it wrote.

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
        self.calls, self._path, self._settings = calls, path, dict(settings)
        self._entries: list[dict] = []
        self._digest = _digest("", json.dumps(self._settings))
        if path is not None:
            found = agree(self._read(resume) if PartialState().is_main_process else None)
            self._entries, self._digest = found
        self._next = 0
        self.spent = 0

    @property
    def num_resumed(self) -> int:
        """Pieces of work that an earlier run has done."""
        return len(self._entries)

    def _read(self, resume: bool) -> tuple[list[dict], str]:
        folder = next(parent for parent in self._path.parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise ValueError(f"Nothing can be written in '{folder}'. Choose another --output-dir.")
        if not self._path.exists():
            return [], self._digest
        if not resume:
            raise ValueError(
                f"'{self._path}' is the journal of a search that did not finish. Pass --resume to go on with it, or "
                "delete it to begin again."
            )
        *lines, torn = self._path.read_bytes().split(b"\n")
        try:
            if not lines and not self._header.encode().startswith(torn):
                raise ValueError("it does not begin as one")
            (settings, *entries), digest = _checked(lines or [self._header.encode()])
            settings, _ = dict(settings), [(entry["calls"], entry["outcome"]) for entry in entries]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"'{self._path}' is no journal of a search, or damaged ({error}). Delete it to begin again."
            ) from error
        self._check_settings(settings)
        if torn:
            os.truncate(self._path, sum(len(line) + 1 for line in lines))
        return entries, digest

    @property
    def _header(self) -> str:
        settings = json.dumps(self._settings)
        return f"{_digest('', settings)} {settings}"

    def _check_settings(self, settings: Mapping):
        now = json.loads(json.dumps(self._settings))
        changed = sorted(key for key in {*settings, *now} if settings.get(key) != now.get(key))
        if changed:
            raise ValueError(
                f"The search in '{self._path}' was begun with other settings: "
                + "; ".join(f"{key} was {settings.get(key)!r}, is {now.get(key)!r}" for key in changed)
                + ". Go on with the old ones, or choose another --output-dir."
            )

    def remember(self, compute: Callable[[], object]) -> object:
        """
        The outcome of the search's next piece of work: read, or else computed and written.

        Args:
            compute: Makes the outcome, the same JSON on all processes.
        """
        if self._next == len(self._entries):
            before = self.calls.count
            outcome = compute()
            entry = json.dumps({"calls": total(self.calls.count - before), "outcome": outcome})
            self._append(entry)
            # As it would come back from disk.
            self._entries.append(json.loads(entry))
        entry = self._entries[self._next]
        self._next += 1
        self.spent += entry["calls"]
        return entry["outcome"]

    def _append(self, entry: str):
        self._digest = _digest(self._digest, entry)
        if self._path is None or not PartialState().is_main_process:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a") as file:
            if file.tell() == 0:
                file.write(f"{self._header}\n")
            file.write(f"{self._digest} {entry}\n")
            file.flush()
            os.fsync(file.fileno())

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


def _digest(before: str, line: str) -> str:
    """Of a line and all before it."""
    return hashlib.sha256(f"{before} {line}".encode()).hexdigest()


def _checked(lines: Sequence[bytes]) -> tuple[list, str]:
    """What the lines say, and the last one's digest."""
    found, digest = [], ""
    for line in lines:
        said, _, content = line.decode().partition(" ")
        digest = _digest(digest, content)
        if said != digest:
            raise ValueError("its checksum is another")
        found.append(json.loads(content))
    return found, digest
