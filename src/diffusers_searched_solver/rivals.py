"""What a solver has to beat: diffusers' own few-step schedulers, each at all settings that are worth trying."""

import itertools
from collections.abc import Mapping

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from .configs import prediction_type_from_config


FLOW_SHIFTS = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0)


def diffusers_schedulers(config: Mapping) -> dict[str, dict[str, SchedulerMixin]]:
    """
    diffusers' few-step schedulers for a model, by family and setting; all make one network call a step.

    Args:
        config: The config of the pipeline's scheduler.
    """
    flow = prediction_type_from_config(config) == "flow_prediction"
    with torch.device("cpu"):  # their numbers are read
        return _flow_schedulers(config) if flow else _variance_preserving_schedulers(config)


def _flow_schedulers(config) -> dict[str, dict[str, SchedulerMixin]]:
    train = {"num_train_timesteps": config.get("num_train_timesteps", 1000)}
    flow = {**train, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    families = {
        "Euler": lambda shift: FlowMatchEulerDiscreteScheduler(**train, shift=shift),
        "DPM-Solver++(2M)": lambda shift: DPMSolverMultistepScheduler(**flow, flow_shift=shift),
        "DPM-Solver++(3M)": lambda shift: DPMSolverMultistepScheduler(**flow, flow_shift=shift, solver_order=3),
        "UniPC 2": lambda shift: UniPCMultistepScheduler(**flow, flow_shift=shift),
        "UniPC 3": lambda shift: UniPCMultistepScheduler(**flow, flow_shift=shift, solver_order=3),
        "DEIS 2": lambda shift: DEISMultistepScheduler(**flow, flow_shift=shift),
        "DEIS 3": lambda shift: DEISMultistepScheduler(**flow, flow_shift=shift, solver_order=3),
    }
    return {name: {f"shift {s:g}": make(s) for s in FLOW_SHIFTS} for name, make in families.items()}


def _variance_preserving_schedulers(config) -> dict[str, dict[str, SchedulerMixin]]:
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    model = {key: config[key] for key in keys if config.get(key) is not None}
    spacings = {
        "trailing": {"timestep_spacing": "trailing"},
        "leading": {"timestep_spacing": "leading", "steps_offset": 1},
        "linspace": {"timestep_spacing": "linspace"},
        "Karras": {"timestep_spacing": "trailing", "use_karras_sigmas": True},
        "exponential": {"timestep_spacing": "trailing", "use_exponential_sigmas": True},
    }
    classes = {
        "DPM-Solver++({}M)": (DPMSolverMultistepScheduler, {"uniform lambda": {"use_lu_lambdas": True}}),
        "UniPC {}": (UniPCMultistepScheduler, {}),
        "DEIS {}": (DEISMultistepScheduler, {}),
    }
    families = {
        "DDIM": {
            name: DDIMScheduler(**model, clip_sample=False, timestep_spacing=name, steps_offset=int(name == "leading"))
            for name in ("trailing", "leading", "linspace")
        }
    }
    for (title, (cls, more)), order in itertools.product(classes.items(), (2, 3)):
        families[title.format(order)] = {
            name: cls(**model, solver_order=order, **spacing) for name, spacing in {**spacings, **more}.items()
        }
    return families
