"""Noise processes in writing: what a diffusers scheduler's config says of one, and the JSON in a solver file."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import asdict
from inspect import signature

import diffusers

from .process import PREDICTION_TYPES, FlowMatching, NoiseProcess, VariancePreserving


_PROCESSES = {cls.kind: cls for cls in (FlowMatching, VariancePreserving)}
BETAS = ("beta_start", "beta_end", "beta_schedule")


def process_from_config(config: Mapping) -> NoiseProcess:
    """
    The noise process that a diffusers scheduler config describes.

    Raises:
        ValueError: If it is of another kind: EDM (SVD, Stable Audio, Cosmos 1 and 2), TrigFlow, Wuerstchen, or flows
            that run from data to noise (Mochi, LongCat-AudioDiT).
    """
    signs = [key for key in ("invert_sigmas", "scaler", "sigma_data") if config.get(key)]
    if signs or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"The config of {_scheduler_of(config)} describes neither DDPM's noise process nor "
            f"flow matching from noise to data: it has {', '.join(signs) or 'continuous timesteps'}. A searched "
            "solver is for models of those two; keep the pipeline's own scheduler."
        )
    num_train_timesteps = config.get("num_train_timesteps", 1000)
    if prediction_type_from_config(config) == "flow_prediction":
        return FlowMatching(num_train_timesteps)
    return VariancePreserving(
        num_train_timesteps,
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        beta_schedule=config.get("beta_schedule", "linear"),
        trained_betas=config.get("trained_betas"),
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
        snr_shift_scale=config.get("snr_shift_scale", 1.0),
    )


def _scheduler_of(config: Mapping) -> str:
    """Whose config it is: a scheduler that was made in Python does not say, but no other may have the same entries."""
    if "_class_name" in config:
        return config["_class_name"]
    entries = {key for key in config if not key.startswith("_")}
    classes = [cls for cls in vars(diffusers.schedulers).values() if isinstance(cls, type)]
    names = {cls.__name__ for cls in classes if {*signature(cls.__init__).parameters} - {"self"} == entries}
    return " or ".join(sorted(names)) or "this scheduler"


def prediction_type_from_config(config: Mapping) -> str:
    """
    What the network of a diffusers scheduler config predicts.

    FlowMatch schedulers have no `prediction_type` in their config; their class name tells, or else their `shift`.

    Raises:
        ValueError: If it is something unknown.
    """
    if str(config.get("_class_name", "")).startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return "flow_prediction"
    if "shift" in config and "prediction_type" not in config:
        return "flow_prediction"
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"`prediction_type` is {reprlib.repr(prediction_type)}, expected one of {', '.join(PREDICTION_TYPES)}."
        )
    return prediction_type


def deduced_entries(config: Mapping) -> dict:
    """Entries of our config that the config of another scheduler does not give, or gives in its own way."""
    given = {key: value for key, value in config.items() if key not in config.get("_use_default_values", ())}
    deduced = {}
    if prediction_type_from_config(config) != given.get("prediction_type", "epsilon"):
        deduced["prediction_type"] = prediction_type_from_config(config)
    if config.get("use_flow_sigmas") and "shift" not in given:
        deduced["shift"] = config.get("flow_shift", 1.0)
    return deduced


def process_to_json(process: NoiseProcess) -> str:
    """One line of JSON from which `process_from_json` rebuilds the process."""
    return json.dumps({"kind": process.kind, **asdict(process)}, sort_keys=True)


def process_from_json(text: str) -> NoiseProcess:
    """
    Rebuild a process from `process_to_json`.

    Raises:
        ValueError: If `text` is not such a line.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict) or fields.get("kind") not in tuple(_PROCESSES):
        raise ValueError(f"`process` is {text[:80]!r}, expected an object with `kind` one of {', '.join(_PROCESSES)}.")
    kind = fields.pop("kind")
    try:
        return _PROCESSES[kind](**fields)
    except TypeError as error:
        raise ValueError(f"`process` is {text[:80]!r}, which does not describe a {kind} process.") from error
