"""A scheduler and its solver on disk and on the Hub: one folder, loaded and saved together."""

import os
from collections.abc import Mapping
from pathlib import Path

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import logging

from .carrying import fitted_to
from .configs import BETAS, deduced_entries, process_from_config
from .limiting import LIMITS
from .loading import (
    BUNDLED_SOLVERS,
    ConnectionBroken,
    cannot_load,
    check_config,
    check_spelling,
    find_solver_file,
    hub_has_no_address,
    list_bundled_solvers,
    solver_from_hub,
)
from .serialization import MAX_BYTES, SOLVER_FILE, SolverFile, load_solver_file, save_solver_file


logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "token", "local_files_only", "revision")


class SavedWithSolver(SchedulerMixin, ConfigMixin):
    """
    What [`SearchedSolverScheduler`] is loaded and saved by.

    Attributes:
        process (`NoiseProcess`): That of the config.
        solver_file (`SolverFile`, *optional*): What lies beside the config.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs,
    ):
        """
        Load a scheduler with its solver from a local folder, by the name of a bundled solver, or from the Hub.

        Args:
            pretrained_model_name_or_path: Tried in this order: a folder written by `save_pretrained` or by
                `search/run.py`; one of [`list_bundled_solvers`]; a Hub repository.
            subfolder (`str`, *optional*): Where in it.
            return_unused_kwargs (`bool`): As in [`SchedulerMixin.from_pretrained`].
            kwargs: `revision`, `cache_dir`, `token`, `local_files_only` and so on, as in
                [`SchedulerMixin.from_pretrained`].

        Raises:
            EnvironmentError: If there is nothing of that name, or no config of a scheduler.
            SolverFileError: If the solver file cannot be trusted.
            ValueError: If the config describes no model that the solver is for.
        """
        name = str(pretrained_model_name_or_path)
        source = str(BUNDLED_SOLVERS / name) if _is_bundled(name) else name
        if source == name:
            check_spelling(name)
        _check_folder(name, source, subfolder, cls.config_name)
        if not os.path.isdir(source) and not kwargs.get("force_download") and hub_has_no_address():
            kwargs["local_files_only"] = True
        try:
            config, others, commit_hash = cls.load_config(
                source, subfolder=subfolder, return_unused_kwargs=True, return_commit_hash=True, **kwargs
            )
        except (OSError, ValueError, ConnectionBroken) as error:
            raise cannot_load(name, error) from error
        solver = _solver_beside(source, subfolder, commit_hash, kwargs)
        if solver is None:
            logger.warning(
                f"'{name}' has no '{SOLVER_FILE}', so this scheduler is a classical multistep scheduler. "
                "Search a solver with `accelerate launch search/run.py`."
            )
        loaded = cls.from_config(config, return_unused_kwargs=return_unused_kwargs, solver=solver, **others)
        # Where modular pipelines load it from again; without it they would rebuild it from its config alone.
        load_id = "|".join(part or "null" for part in (name, subfolder, kwargs.get("variant"), kwargs.get("revision")))
        (loaded[0] if return_unused_kwargs else loaded)._diffusers_load_id = load_id
        return loaded

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, **kwargs) -> dict:
        """
        diffusers' reader of configs, which may come from anywhere: refuse what is no scheduler's config.

        Args:
            kwargs: Before version 0.42 diffusers passes `dduf_entries`.
        """
        if os.path.getsize(json_file) > MAX_BYTES:
            raise ValueError(f"'{json_file}' has {os.path.getsize(json_file)} bytes, a config at most {MAX_BYTES}.")
        try:
            config = super()._dict_from_json_file(json_file, **kwargs)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"'{json_file}' cannot be read as JSON ({error}). If it was damaged on its way, `force_download=True` "
                "fetches it anew."
            ) from error
        check_config(json_file, config)
        return config

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, solver=None, **kwargs):
        """
        Build a scheduler for the model that a scheduler config describes.

        Args:
            config: Usually `pipe.scheduler.config`; its noise process and prediction type are kept.
            return_unused_kwargs (`bool`): As in [`ConfigMixin.from_config`].
            solver (*optional*): A [`SolverFile`], one [`SearchedSolver`], the path of a solver file or of a folder
                with one, or the name of a bundled solver.
            kwargs: Config entries to change. `thresholding` and `clip_sample` of another scheduler's config limit the
                data that is predicted in every step; `thresholding=False, clip_sample=False` turns that off.

        Raises:
            ValueError: If the solver is for the other kind of noise process, or the config for neither.
        """
        if config is not None:
            process_from_config(config)
            config = _with_limits(config, {key: kwargs.pop(key) for key in LIMITS if key in kwargs})
            kwargs = {**{key: config[key] for key in BETAS if key in config}, **kwargs}
            if config.get("snr_shift_scale", 1.0) != 1.0:
                kwargs.setdefault("snr_shift_scale", config["snr_shift_scale"])
        deduced = {} if config is None else deduced_entries(config)
        hidden = deduced.keys() - kwargs.keys()
        loaded = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **{**deduced, **kwargs})
        scheduler = loaded[0] if return_unused_kwargs else loaded
        if hidden:
            # diffusers hands such entries to no other scheduler: the one they were deduced from would not know them.
            defaults = scheduler.config.get("_use_default_values", ())
            scheduler.register_to_config(_use_default_values=sorted({*defaults, *hidden}))
        if solver is not None:
            if isinstance(solver, (str, os.PathLike)):
                solver = find_solver_file(Path(solver))
            scheduler.solver_file = fitted_to(scheduler.process, scheduler.config.prediction_type, solver)
        return loaded

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save `scheduler_config.json`, and the solver in the sub-folder `solver/` if there is one."""
        if not os.path.isfile(save_directory):
            path = Path(save_directory, SOLVER_FILE)
            for link in (path.parent, Path(save_directory, self.config_name)):
                # Through it, files of another folder would be overwritten.
                if link.is_symlink():
                    link.unlink()
            if self.solver_file is None:
                # What an earlier save has left would be loaded as this scheduler's.
                path.unlink(missing_ok=True)
            else:
                save_solver_file(self.solver_file, path)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


def _with_limits(config: Mapping, limits: Mapping) -> Mapping:
    """A config with entries that our constructor does not name; diffusers would go on with the old values."""
    if not limits:
        return config
    defaults = [key for key in config.get("_use_default_values", ()) if key not in limits]
    return {**config, **limits, "_use_default_values": defaults}


def _is_bundled(name: str) -> bool:
    return not os.path.isdir(name) and name in list_bundled_solvers()


def _check_folder(name: str, source: str, subfolder: str | None, config_name: str):
    """Refuse sub-folders that lead out of a folder, or to no config."""
    folder = Path(source, subfolder or "")
    if not folder.is_relative_to(source) or ".." in Path(subfolder or "").parts:
        raise cannot_load(name, ValueError(f"`subfolder` is {subfolder!r}, which leads out of it."))
    if os.path.isdir(source) and not (folder / config_name).is_file():
        # Without a config in the sub-folder, diffusers would take the one above it.
        raise cannot_load(name, FileNotFoundError(f"'{folder}' has no file named {config_name}."))


def _solver_beside(
    source: str, subfolder: str | None, commit_hash: str | None, arguments: Mapping
) -> SolverFile | None:
    """
    The solver that lies beside a config, if there is one.

    Args:
        commit_hash: Of the config, if it is from the Hub.
        arguments: Those of `from_pretrained`.
    """
    if os.path.isdir(source):
        path = Path(source, subfolder or "", SOLVER_FILE)
        return load_solver_file(path) if os.path.lexists(path) else None
    hub_kwargs = {key: arguments[key] for key in _HUB_ARGUMENTS if key in arguments}
    return solver_from_hub(source, subfolder, commit_hash, hub_kwargs)
