"""
Upload a finished search to the Hub.

    python -m search.results.publish OUT org/name

OUT is what `search/run.py` wrote; with --push-to-hub it uploads it itself. A repository that exists is updated.
"""

import argparse
import shlex
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.serialization import SOLVER_FILE

from .card import CARD, IMAGES, write_card
from .record import NAME


FILES = (CARD, NAME, "report.html", IMAGES, SearchedSolverScheduler.config_name, SOLVER_FILE)


class PublishError(RuntimeError):
    """The upload failed; the message says why, and how to try again."""


def check_target(repo_id: str) -> None:
    """
    Find, before hours of searching, what would keep a solver from being uploaded after them.

    Raises:
        ValueError: If `repo_id` is not "org/name", or nobody is logged in.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"The repository is '{repo_id}', expected 'org/name'. Put your user name before it.")
    if get_token() is None:
        raise ValueError(f"Nobody is logged in who could upload to '{repo_id}'. Run `hf auth login`, or set HF_TOKEN.")


def publish(folder: Path, repo_id: str) -> str:
    """
    Upload what a search wrote in one commit. The repository is made if need be, as public as its owner's are.

    Args:
        folder: Where the search wrote. Its card is written anew, with the repository's name.
        repo_id (`str`): The repository, "org/name".

    Returns:
        `str`: The repository's address.

    Raises:
        PublishError: If anything goes wrong. The folder has everything then.
    """
    try:
        check_target(repo_id)
        if not (folder / NAME).is_file():
            raise FileNotFoundError(f"There is no '{folder / NAME}'.")
        write_card(folder, repo_id)
        api = HfApi()
        address = str(api.create_repo(repo_id, exist_ok=True))
        added = {name for name in FILES if (folder / name).is_file()}
        # Of an earlier search, such as one with images.
        stale = {*FILES} & {*api.list_repo_files(repo_id)} - added
        operations = [CommitOperationAdd(name, folder / name) for name in sorted(added)]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        api.create_commit(repo_id, operations, commit_message="Upload a searched solver")
    except Exception as error:  # Whatever it is, it must not look as if the search had failed.
        command = shlex.join(["python", "-m", "search.results.publish", str(folder), repo_id])
        raise PublishError(
            f"The solver was not uploaded to '{repo_id}': {' '.join(str(error).split())}\nEverything is in "
            f"'{folder}'. Try again with\n  {command}"
        ) from error
    return address


def main(arguments: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT", help="the --output-dir of a finished search")
    parser.add_argument("repo_id", metavar="org/name", help="the Hub repository")
    args = parser.parse_args(arguments)
    try:
        print(f"Uploaded to {publish(args.folder, args.repo_id)}")
    except PublishError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
