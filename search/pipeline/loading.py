"""From a command-line word to a pipeline."""

import importlib.util
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_searched_solver.calls import pipeline_class

from .readying import components_of, default_dtype, make_ready, quantization_config


HUB_NAMES = {"DiT-XL-2-256": "facebook/DiT-XL-2-256", "DiT-XL-2-512": "facebook/DiT-XL-2-512"}
# Official weights that have to be converted first: Hub repository, file, and arguments of the conversion.
CHECKPOINTS = {
    "SiT-XL-2-256": ("nyu-visionx/SiT-collections", "SiT-XL-2-256.pt", "--model sit"),
    "FlowDCN-XL-2-256": ("wangsssssss/FlowDCN", "FlowDCN-XL-2M-R256.pth", "--model flowdcn"),
    "FlowDCN-XL-2-512": ("wangsssssss/FlowDCN", "FlowDCN-XL-100K-R512.pth", "--model flowdcn --sample-size 64"),
    "FlowDCN-B-2-256": ("wangsssssss/FlowDCN", "FlowDCN-B-400K-R256.pth", "--model flowdcn"),
}
SINGLE_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".gguf")
NAMES = (*HUB_NAMES, *CHECKPOINTS)


def hub_repository(name: str) -> str | None:
    """The Hub repository that `load_pipeline` takes for `name`, if it is not a folder."""
    return None if os.path.isdir(name) or ".py:" in name else HUB_NAMES.get(name, name)


@dataclass(frozen=True)
class Source:
    """
    A pipeline as the command line names it.

    Args:
        name (`str`): A local folder, one of `NAMES`, a Hub repository (in this order), or `FILE.py:FUNCTION`, whose
            function returns a pipeline that somebody prepared: an own class, a LoRA, quantised, patched.
        variant, revision, custom_pipeline (`str`, *optional*): As in `DiffusionPipeline.from_pretrained`.
        loras (`Sequence[str]`): Repositories or files, each perhaps with its scale: "org/name:0.8".
        quantization, offload (`str`, *optional*): One of `readying.QUANTIZERS`, one of `readying.OFFLOADS`.
        compiled (`bool`): Whether the networks are compiled.
    """

    name: str
    variant: str | None = None
    revision: str | None = None
    custom_pipeline: str | None = None
    loras: Sequence[str] = ()
    quantization: str | None = None
    offload: str | None = None
    compiled: bool = False


def load_pipeline(source: Source | str, dtype: torch.dtype | None, device: torch.device) -> DiffusionPipeline:
    """
    Load a pipeline.

    Args:
        source: Which; a name alone will do.
        dtype (*optional*): Of the networks; by default that of `readying.default_dtype`.
        device: Where they go. What a function has prepared stays as and where it is.

    Raises:
        ValueError: If there is no such pipeline, it has to be converted first, or a function has prepared it in
            another dtype than is asked for.
    """
    source = Source(source) if isinstance(source, str) else source
    name = source.name
    if ".py:" in name:
        return _prepared(*name.rsplit(":", 1), dtype)
    if Path(name).suffix in SINGLE_FILES and not os.path.isdir(name):
        raise ValueError(
            f"'{name}' is a single file, which does not say what pipeline it is for. Write `mine.py` with a function "
            "`def make_pipeline(): return StableDiffusionXLPipeline.from_single_file(...)`, or whatever class "
            "that is, and pass `--pipeline mine.py:make_pipeline`."
        )
    if name in CHECKPOINTS and not os.path.isdir(name):
        repository, file, arguments = CHECKPOINTS[name]
        raise ValueError(
            f"'{name}' has to be converted first, as there is no folder of that name here. Run\n"
            f"  hf download {repository} {file} --local-dir .\n"
            f"  python -m diffusers_searched_solver.convert {arguments} --checkpoint {file} --output {name}"
        )
    pipe = _from_pretrained(source, dtype, device)
    for lora in source.loras:
        _add_lora(pipe, lora)
    return make_ready(pipe, device, source.offload, source.compiled)


def _from_pretrained(source: Source, dtype: torch.dtype | None, device: torch.device) -> DiffusionPipeline:
    place = hub_repository(source.name) or source.name
    options = {"variant": source.variant, "revision": source.revision, "custom_pipeline": source.custom_pipeline}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        cls = pipeline_class(place)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no pipeline '{source.name}': it is not a folder with a 'model_index.json', not one of "
            f"{', '.join(NAMES)}, and as a Hub repository it could not be read ({str(error).splitlines()[0]}). "
            "Check the spelling, or the connection."
        ) from error
    try:
        if dtype is None and device.type != "cpu":
            place = place if os.path.isdir(place) else cls.download(place, **options)
        dtype = dtype or default_dtype(place, source.variant, device)
        if source.quantization is not None:
            components = components_of(cls.load_config(place, revision=source.revision))
            options["quantization_config"] = quantization_config(source.quantization, components, dtype)
        return cls.from_pretrained(place, dtype=dtype, **options)
    except (OSError, ValueError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"The pipeline '{source.name}' cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _prepared(file: str, function: str, dtype: torch.dtype | None) -> DiffusionPipeline:
    """What a function in a file of Python returns."""
    if not os.path.isfile(file):
        raise ValueError(f"There is no file '{file}' with a function `{function}` that makes the pipeline.")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"'{file}' has no function `{function}`. It has to return the pipeline, without arguments.")
    pipe = make()
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"`{function}` in '{file}' returned {type(pipe).__name__}, expected a diffusers pipeline.")
    if dtype is not None and pipe.dtype != dtype:
        raise ValueError(
            f"`{function}` in '{file}' returned a pipeline in {str(pipe.dtype).removeprefix('torch.')} where "
            f"{str(dtype).removeprefix('torch.')} is asked for. Prepare it so, or do not ask for a precision."
        )
    return pipe


def _add_lora(pipe: DiffusionPipeline, lora: str):
    """Fuse a LoRA into the pipeline's networks."""
    name, _, scale = lora.rpartition(":")
    try:
        scale = float(scale)
    except ValueError:
        name, scale = lora, 1.0
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA. Leave out --lora.")
    try:
        pipe.load_lora_weights(name)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"The LoRA '{name}' cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def takes_guidance(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's call has a `guidance_scale`."""
    return "guidance_scale" in inspect.signature(type(pipe).__call__).parameters
