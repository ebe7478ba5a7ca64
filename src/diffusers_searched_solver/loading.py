"""Where solvers come from: folders, the package itself and the Hub. What cannot be loaded is said for what it is."""

import difflib
import os
import reprlib
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from diffusers.configuration_utils import FrozenDict
from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from .serialization import SOLVER_FILE, SolverFile, SolverFileError, load_solver_file


# What the HTTP library of the Hub client raises, whichever it is, when a connection breaks for good.
ConnectionBroken = HfHubHTTPError.__bases__[0]
BUNDLED_SOLVERS = Path(__file__).parent / "solvers"


def list_bundled_solvers() -> list[str]:
    """Names of the solvers that ship with this package, for [`SearchedSolverScheduler.from_pretrained`]."""
    return sorted(folder.name for folder in BUNDLED_SOLVERS.iterdir() if (folder / SOLVER_FILE).is_file())


def check_spelling(name: str):
    """Refuse what is nearly the name of a bundled solver: without a connection, the Hub's client tries for long."""
    near = difflib.get_close_matches(name, list_bundled_solvers(), n=1)
    if near and "/" not in name and not os.path.isdir(name):
        raise cannot_load(name, FileNotFoundError(f"there is no such folder. Did you mean '{near[0]}'?"))


def hub_has_no_address() -> bool:
    """Whether there is no way to the Hub, as without a connection: its client would try six times all the same."""
    if getproxies().keys() & {"http", "https", "all"}:
        return False
    try:
        return not socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True


def find_solver_file(path: Path) -> SolverFile:
    candidates = [path, path / SOLVER_FILE]
    if str(path) in list_bundled_solvers():
        candidates.append(BUNDLED_SOLVERS / path / SOLVER_FILE)
    for candidate in candidates:
        if candidate.is_file():
            return load_solver_file(candidate)
    raise FileNotFoundError(
        f"No solver file at '{path}' or '{path / SOLVER_FILE}', and no bundled solver of that name: expected a path "
        f"or one of {', '.join(list_bundled_solvers())}. For a Hub repository use "
        "`SearchedSolverScheduler.from_pretrained(repo_id)`."
    )


def solver_from_hub(
    repo_id: str, subfolder: str | None, commit_hash: str | None, hub_kwargs: Mapping
) -> SolverFile | None:
    """The solver of the same commit as the config, or None if that commit has none."""
    filename = f"{subfolder}/{SOLVER_FILE}" if subfolder else SOLVER_FILE
    hub_kwargs = {**hub_kwargs, "revision": commit_hash or hub_kwargs.get("revision")}
    try:
        return load_solver_file(hf_hub_download(repo_id, filename, **hub_kwargs))
    except SolverFileError as error:
        raise SolverFileError(
            f"{error} The file is from commit {commit_hash} of '{repo_id}'. If it was damaged on its way, "
            "`from_pretrained(..., force_download=True)` fetches it anew."
        ) from error
    except EntryNotFoundError as error:
        cached = try_to_load_from_cache(repo_id, filename, hub_kwargs.get("cache_dir"), hub_kwargs["revision"])
        if not isinstance(error, LocalEntryNotFoundError) or cached is _CACHED_NO_EXIST:
            return None
        raise cannot_load(repo_id, error) from error
    except (OSError, ValueError, ConnectionBroken) as error:
        raise cannot_load(repo_id, error) from error


def check_config(path: str | os.PathLike, config: object):
    """Refuse, with a `ValueError`, JSON of which diffusers could not or should not make a scheduler."""
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' holds a JSON {type(config).__name__}, expected an object.")
    # diffusers makes keyword arguments and attributes of the keys, and imports the class that is named.
    odd = [key for key in config if hasattr(FrozenDict, key) or key in ("self", "dtype")]
    class_name, defaults = config.get("_class_name", "Scheduler"), config.get("_use_default_values", [])
    if isinstance(class_name, str) and not class_name.endswith("Scheduler"):
        odd.append("_class_name")
    if not isinstance(defaults, list) or not all(isinstance(key, str) for key in defaults):
        odd.append("_use_default_values")
    if odd:
        raise ValueError(f"'{path}' is no scheduler's config: `{odd[0]}` is {reprlib.repr(config[odd[0]])}.")


def cannot_load(name: str, error: Exception) -> EnvironmentError:
    """The error for a user for whom `name` could not be loaded."""
    # diffusers raises anew, and its message does not tell these from each other.
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        reason = (
            f"its owner has gated it. Ask for access at {constants.ENDPOINT}/{name}, then pass `token` or log in with "
            "`hf auth login`."
        )
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        reason = (
            "it is not a folder, and the Hub has no such repository, or not for you. If it is private, pass a `token` "
            "that opens it or log in with `hf auth login`."
        )
    elif any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        reason = (
            "it is not a folder, a part of it is not in the cache, and the Hub was not asked (`local_files_only` or "
            "HF_HUB_OFFLINE) or did not answer. Try again with a connection."
        )
    elif not isinstance(error, (OSError, ValueError)):
        reason = f"the connection to the Hub broke ({error}). Try again."
    else:
        reason = str(error)
    return OSError(
        f"Cannot load a scheduler from '{name}': {reason}\nExpected a folder written by `save_pretrained` or by "
        f"`search/run.py`, a bundled solver ({', '.join(list_bundled_solvers())}), or a Hub repository."
    )
