"""Solvers that others have published on the Hub."""

from huggingface_hub import HfApi


# What the cards of published solvers are tagged with.
TAG = "searched-solver"


def list_hub_solvers(base_model: str | None = None) -> list[str]:
    """
    Repositories with searched solvers, for [`SearchedSolverScheduler.from_pretrained`].

    Args:
        base_model (`str`, *optional*): The Hub repository of the model that they have to be for.

    Returns:
        `list[str]`: The most downloaded first.

    Raises:
        OSError: If the Hub cannot be asked.
    """
    tags = [TAG] if base_model is None else [TAG, f"base_model:{base_model}"]
    try:
        return [model.id for model in HfApi().list_models(filter=tags, sort="downloads")]
    except Exception as error:  # The client's own when there is no connection, of another package in each version.
        raise OSError(f"The Hub could not be asked for solvers ({error}). Try again with a connection.") from error
