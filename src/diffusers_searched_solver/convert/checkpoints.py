"""Checkpoints of SiT, DiT and FlowDCN: every layout brought to the official names, and the config in the shapes."""

import argparse
import json
import math
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..models import FlowDCNTransformer2DModel, SiTTransformer2DModel
from ..models.sit_transformer_2d import _position_table


# The only hyper-parameter of SiT and DiT that no shape tells: heads by width, in all published sizes.
HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}

# Official name -> name in diffusers' `DiTTransformer2DModel`; the embedders lie in every one of its blocks.
_DIT_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_DIT_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_DIT_BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


def read_checkpoint(model: str, path: Path) -> tuple[dict[str, torch.Tensor], int | None]:
    """
    Read the weights in a checkpoint, and those of the EMA where it has both. Nothing in it is run.

    Args:
        model (`str`): `"sit"`, `"dit"` or `"flowdcn"`.
        path (`Path`): A `.safetensors` file or one of `torch.save`: a state dict, bare, under `"ema"` as the official
            training scripts have it, or under `"state_dict"` with the prefix `denoiser.` or `ema_denoiser.`; a
            Lightning checkpoint with FlowDCN's EMA list; or, for DiT, diffusers' `DiTTransformer2DModel` with its
            `config.json`. Also a folder with such a file or its shards, or a pipeline's folder around that.

    Returns:
        The weights under their official names, and the number of attention heads if the checkpoint says it.

    Raises:
        ValueError: If it cannot be read, or is none of these.
    """
    if (path / "transformer").is_dir():
        path = path / "transformer"
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files or not files[0].is_file():
        raise ValueError(
            f"There is no checkpoint '{path}': expected a file, or a folder with '*.safetensors' or '*.bin' files or"
            " a sub-folder 'transformer' of that kind. Check the path."
        )
    weights = {}
    for file in files:
        _add(weights, _unwrap(_load(file), file), file)
    if model == "dit" and any(name.startswith("transformer_blocks.") for name in weights):
        return _from_diffusers(weights, files[0].with_name("config.json"))
    return weights, None


def empty_network(
    model: str, weights: dict[str, torch.Tensor], num_heads: int | None, sample_size: int
) -> SiTTransformer2DModel | FlowDCNTransformer2DModel:
    """
    Make the network that weights belong to, on the meta device; its config is read off their shapes.

    Args:
        model (`str`): `"sit"`, `"dit"` or `"flowdcn"`.
        weights (`dict[str, torch.Tensor]`): Under their official names.
        num_heads (`int`, *optional*): Attention heads of SiT and DiT, by default those of a published size.
        sample_size (`int`): Height and width of FlowDCN's latent.

    Raises:
        ValueError: If a tensor is missing that tells the config, or the heads are not known.
    """
    with torch.device("meta"):
        if model == "flowdcn":
            return _flowdcn(weights, sample_size)
        return _sit(weights, num_heads, "epsilon" if model == "dit" else "flow_prediction")


def check_names(found: Iterable[str], expected: Iterable[str]):
    """Raise a `ValueError` that lists the names missing and left over, if there are any."""
    found, expected = set(found), set(expected)
    if found != expected:
        raise ValueError(
            "The checkpoint does not fit the model."
            + _listing(" Missing: ", expected - found)
            + _listing(" Left over: ", found - expected)
            + " Check `--model`, and that the checkpoint is whole."
        )


def _listing(title: str, names: set[str]) -> str:
    return f"{title}{', '.join(sorted(names))}." if names else ""


def _sit(weights: dict[str, torch.Tensor], num_heads: int | None, prediction_type: str) -> SiTTransformer2DModel:
    common = _common_config(weights, also=("pos_embed", "blocks.0.mlp.fc1.bias"))
    width = len(weights["x_embedder.proj.bias"])
    num_heads = num_heads or HEADS.get(width)
    if num_heads is None or width % num_heads:
        raise ValueError(
            f"The network is {width} wide and has {num_heads or 'an unknown number of'} heads, which no shape in the"
            f" checkpoint tells. Pass `--num-heads` with a divisor of {width}."
        )
    return SiTTransformer2DModel(
        **common,
        sample_size=math.isqrt(weights["pos_embed"].shape[1]) * common["patch_size"],
        num_attention_heads=num_heads,
        attention_head_dim=width // num_heads,
        mlp_ratio=len(weights["blocks.0.mlp.fc1.bias"]) / width,
        prediction_type=prediction_type,
    )


def _flowdcn(weights: dict[str, torch.Tensor], sample_size: int) -> FlowDCNTransformer2DModel:
    groups, prior = "blocks.0.attn.deformables_scale", "blocks.0.attn.deformables_prior"
    common = _common_config(weights, also=(groups, prior))
    return FlowDCNTransformer2DModel(
        **common,
        sample_size=sample_size,
        hidden_size=len(weights["x_embedder.proj.bias"]),
        num_groups=weights[groups].numel(),
        kernel_size=math.isqrt(weights[prior].shape[-2]),
    )


def _common_config(weights: dict[str, torch.Tensor], also: tuple[str, ...]) -> dict:
    outer = ("x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.bias")
    telling = {*outer, "y_embedder.embedding_table.weight", *also}
    check_names(telling & weights.keys(), telling)
    _, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    return {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": len(weights["final_layer.linear.bias"]) == 2 * in_channels * patch_size**2,
    }


def _load(file: Path) -> dict | object:
    """Read what holds weights alone into memory, where parts can be joined and dropped; leave the rest on disk."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file, backend="pread")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments in a training checkpoint
            return torch.load(file, map_location="cpu", weights_only=True, mmap=file.suffix != ".bin")
    except pickle.UnpicklingError as error:
        objects = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        raise ValueError(
            f"'{file}' holds Python objects ({objects}), and only tensors are read. If you trust it, load it yourself"
            " and save its state dict alone, with `torch.save(state_dict, path)`."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"'{file}' cannot be read as a checkpoint: {str(error).splitlines()[0]} Is the download complete?"
        ) from error


def _add(weights: dict[str, torch.Tensor], part: dict[str, torch.Tensor], file: Path):
    if twice := sorted(part.keys() & weights.keys()):
        raise ValueError(f"'{file}' has `{twice[0]}`, which a file beside it has too. Pass the one file to convert.")
    weights |= part


def _unwrap(content: dict | object, file: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in what a file holds."""
    weights = content if isinstance(content, dict) else {type(content).__name__: content}
    if optimizers := weights.get("optimizer_states"):
        if "ema" in optimizers[0]:
            return _name_flowdcn_list(list(optimizers[0]["ema"]))
    weights = next((weights[key] for key in ("ema", "state_dict") if isinstance(weights.get(key), dict)), weights)
    if others := [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(
            f"'{file}' has {', '.join(map(repr, others))} where weights were expected: a state dict, bare or under"
            " 'ema' or 'state_dict'. Save the state dict alone."
        )
    if any(name.startswith("ema_denoiser.") for name in weights):
        weights = {name: value for name, value in weights.items() if not name.startswith("denoiser.")}
    return {re.sub(r"^(ema_)?denoiser\.", "", name): value.detach() for name, value in weights.items()}


def _name_flowdcn_list(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give tensors in the order of FlowDCN's parameters their names."""
    with torch.device("meta"):
        names = [name for name, _ in FlowDCNTransformer2DModel(num_layers=1).named_parameters()]
    block = [name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")]
    num_layers, rest = divmod(len(tensors) - len(names), len(block))
    if rest or num_layers < 0:
        raise ValueError(
            f"The EMA list of the checkpoint has {len(tensors)} tensors, expected {len(names)} for FlowDCN with one"
            f" block and {len(block)} for each further one. Only FlowDCN's weights can be told apart without names."
        )
    names += [f"blocks.{i}.{name}" for i in range(1, num_layers + 1) for name in block]
    return {name: tensor.detach() for name, tensor in zip(names, tensors, strict=True)}


def _from_diffusers(theirs: dict[str, torch.Tensor], config_file: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Return a `DiTTransformer2DModel` under official names: q, k and v joined, one embedder instead of equal ones."""
    if not config_file.is_file():
        raise ValueError(
            f"There is no '{config_file}', which says the number of heads and the size of the latent. Download it from"
            " where the weights are."
        )
    config = json.loads(config_file.read_text())
    if config.get("activation_fn") != "gelu-approximate":
        raise ValueError(
            f"'{config_file}' has `activation_fn` {config.get('activation_fn')!r}, that of DiT is 'gelu-approximate'."
            " Pass a `DiTTransformer2DModel` with the official activation."
        )
    sources = _diffusers_names(config["num_layers"])
    check_names(theirs, [name for names in sources.values() for name in names])

    weights = {}
    for name, parts in sources.items():
        tensors = [theirs.pop(part) for part in parts]
        if ".qkv." in name:
            weights[name] = torch.cat(tensors)
            continue
        weights[name] = tensors[0]
        if different := [part for part, tensor in zip(parts, tensors, strict=True) if not tensor.equal(tensors[0])]:
            raise ValueError(
                f"`{different[0]}` is not equal to `{parts[0]}`. DiT has one embedder for all blocks, so a checkpoint"
                " with several cannot be converted."
            )
    rows = config["sample_size"] // config["patch_size"]
    weights["pos_embed"] = _position_table(rows, len(weights["x_embedder.proj.bias"]))
    return weights, config["num_attention_heads"]


def _diffusers_names(num_layers: int) -> dict[str, list[str]]:
    """Official name -> the names in diffusers that it is made of."""
    blocks = [f"transformer_blocks.{i}" for i in range(num_layers)]
    modules = {ours: [theirs] for ours, theirs in _DIT_OUTER.items()}
    modules |= {ours: [f"{block}.{theirs}" for block in blocks] for ours, theirs in _DIT_EMBEDDERS.items()}
    for i, block in enumerate(blocks):
        modules |= {f"blocks.{i}.{ours}": [f"{block}.{name}" for name in names] for ours, names in _DIT_BLOCK.items()}
    return {
        f"{ours}.{kind}": [f"{module}.{kind}" for module in theirs]
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
        if (ours, kind) != ("y_embedder.embedding_table", "bias")
    }
