"""How a pipeline is made ready: the dtype of its networks, quantisation, compilation, and what leaves the device."""

import importlib.util
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from safetensors import safe_open


# Components of these names predict.
NETWORKS = ("transformer", "unet")
OFFLOADS = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}


def _bitsandbytes_4bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _bitsandbytes_8bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(dtype: torch.dtype) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# Package that has to be installed, and the config of diffusers.
QUANTIZERS = {
    "bitsandbytes_4bit": ("bitsandbytes", _bitsandbytes_4bit),
    "bitsandbytes_8bit": ("bitsandbytes", _bitsandbytes_8bit),
    "torchao_int8": ("torchao", _torchao_int8),
}


def quantization_config(name: str, components: Iterable[str], dtype: torch.dtype) -> PipelineQuantizationConfig:
    """
    How the networks that predict are quantised while they are loaded.

    Args:
        name (`str`): One of `QUANTIZERS`.
        components: Names of the pipeline's.
        dtype: What is computed in.

    Raises:
        ValueError: If the package for it is not installed, or there is no network that it is for.
    """
    package, make = QUANTIZERS[name]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"`--quantization {name}` needs {package}, which is not installed. Run `pip install {package}`."
        )
    networks = [each for each in components if each.startswith(NETWORKS)]
    if not networks:
        raise ValueError(
            f"`--quantization {name}` is for components whose names begin with {' or '.join(NETWORKS)}; the pipeline "
            f"has {', '.join(components)}. Leave it out, or quantise in a function (`--pipeline mine.py:make`)."
        )
    return PipelineQuantizationConfig(quant_mapping={each: make(dtype) for each in networks})


def default_dtype(folder: str | Path, variant: str | None, device: torch.device) -> torch.dtype:
    """bfloat16 where the weights and an accelerator have it: half the memory. float32 elsewhere."""
    if device.type == "cpu" or device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float32
    return torch.bfloat16 if stored_in_bfloat16(folder, variant) else torch.float32


def stored_in_bfloat16(folder: str | Path, variant: str | None) -> bool:
    """Whether a pipeline's folder has the weights of the networks that predict in bfloat16."""
    files = [file for name in NETWORKS for file in sorted(Path(folder).glob(f"{name}*/*.safetensors"))]
    # A variant is in the name, as in `diffusion_pytorch_model.bf16.safetensors` or `...model.bf16-00001-of-00002...`.
    files = [file for file in files if variant is None or f".{variant}" in file.name]
    for file in files:
        with safe_open(file, "pt") as weights:
            if any(weights.get_slice(key).get_dtype() != "BF16" for key in weights.keys()):  # noqa: SIM118
                return False
    return bool(files)


def make_ready(
    pipe: DiffusionPipeline, device: torch.device, offload: str | None, compiled: bool
) -> DiffusionPipeline:
    """
    Put a pipeline where it runs.

    Args:
        offload (`str`, *optional*): One of `OFFLOADS`: networks, or their layers, are on `device` only while they run.
        compiled (`bool`): Whether the networks that predict are compiled.

    Raises:
        ValueError: If the pipeline cannot be offloaded.
    """
    for name, network in pipe.components.items():
        if compiled and name.startswith(NETWORKS) and isinstance(network, torch.nn.Module):
            network.compile()
    if offload is None:
        return pipe.to(device)
    try:
        getattr(pipe, OFFLOADS[offload])(device=device)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"`--offload {offload}`: {' '.join(str(error).split())}") from error
    return pipe


def device_of(pipe: DiffusionPipeline) -> torch.device:
    """Where its networks run, wherever they are between calls."""
    try:
        return pipe._execution_device
    except AttributeError:
        # Of a network that is a plain module, diffusers does not know.
        modules = [each for each in pipe.components.values() if isinstance(each, torch.nn.Module)]
        tensors = itertools.chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
        return next((each.device for each in tensors), torch.device("cpu"))


def components_of(index: Mapping) -> list[str]:
    """The names in a `model_index.json`."""
    return [name for name, value in index.items() if not name.startswith("_") and isinstance(value, list | tuple)]
