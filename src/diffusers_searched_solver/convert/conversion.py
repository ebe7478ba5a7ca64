"""From a checkpoint of SiT, DiT or FlowDCN to a pipeline's folder."""

import json
import math
import os
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub.utils import tqdm

from ..models import FlowDCNTransformer2DModel, SiTTransformer2DModel
from ..models.sit_transformer_2d import _position_table
from ..pipelines import ClassToImagePipeline
from .checkpoints import check_names, empty_network, read_checkpoint


MODELS = ("sit", "dit", "flowdcn")
VAE = "stabilityai/sd-vae-ft-ema"
LABELS = "facebook/DiT-XL-2-256"
FLOWDCN_SAMPLE_SIZE = 32
# On sines and cosines: the released SiT weights come from JAX, whose float32 rounds them in its own way.
POSITION_TOLERANCE = 1e-5


def convert(
    model: str,
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    vae: str | None = VAE,
    labels: str | None = LABELS,
    num_heads: int | None = None,
    sample_size: int | None = None,
) -> None:
    """
    Convert a checkpoint. The folder is written aside and renamed, so `output` is whole or not there.

    The result is the official network. A DiT that was *trained* by diffusers' `DiTTransformer2DModel` is another
    function, with other frequencies in its time embedding; it needs no conversion.

    Args:
        model (`str`): `"sit"`, `"dit"` or `"flowdcn"`.
        checkpoint (`str` or `os.PathLike`): A file or folder, see `read_checkpoint`.
        output (`str` or `os.PathLike`): The folder to write; it must not exist, or be empty.
        vae (`str`, *optional*): Folder or Hub repository of the autoencoder. `None` for a pipeline without.
        labels (`str`, *optional*): Names of the classes: a JSON file with an object from id to name, or a pipeline's
            folder or Hub repository that has them as `id2label`. `None` for a pipeline without names.
        num_heads (`int`, *optional*): Attention heads of SiT and DiT. Known for the published sizes.
        sample_size (`int`, *optional*): Height and width of the latent that FlowDCN makes unless a call says
            otherwise, 32 by default. Known for SiT and DiT.

    Raises:
        ValueError: If the checkpoint, or anything else that is passed, is not what it has to be.
    """
    output = Path(output)
    _check_arguments(model, output, num_heads, sample_size)
    weights, stated_heads = read_checkpoint(model, Path(checkpoint))
    transformer = empty_network(model, weights, num_heads or stated_heads, sample_size or FLOWDCN_SAMPLE_SIZE)
    id2label = None if labels is None else _read_labels(labels, transformer.config.num_classes)
    if vae is not None:
        _check_vae(vae, transformer.config.in_channels)
    _fill(transformer, weights)
    del weights

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as aside:
        folder = Path(aside, output.name)
        _write(folder, transformer, model, vae, id2label)
        if output.exists():
            output.rmdir()
        os.rename(folder, output)


def _check_arguments(model: str, output: Path, num_heads: int | None, sample_size: int | None):
    if model not in MODELS:
        raise ValueError(f"`model` is {model!r}. Pass one of {', '.join(map(repr, MODELS))}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"The output '{output}' exists. Remove it, or name another folder.")
    if model == "flowdcn" and num_heads is not None:
        raise ValueError(f"`num_heads` is {num_heads}, but FlowDCN has no attention. Leave it out.")
    if model != "flowdcn" and sample_size is not None:
        raise ValueError(f"`sample_size` is {sample_size}, but the checkpoint says that of {model}. Leave it out.")


def _fill(transformer: SiTTransformer2DModel | FlowDCNTransformer2DModel, weights: dict[str, torch.Tensor]):
    """Check names, shapes and values, and put the weights into the network as they are, without a copy."""
    expected = transformer.state_dict()
    check_names(weights, expected)
    if wrong := [name for name in weights if weights[name].shape != expected[name].shape]:
        shapes = (f"`{name}` {tuple(weights[name].shape)} ({tuple(expected[name].shape)})" for name in wrong)
        raise ValueError(f"The checkpoint has shapes that do not fit (expected in brackets): {', '.join(shapes)}.")
    size = sum(tensor.nbytes for tensor in weights.values())
    with tqdm(desc="checking", total=size, unit="B", unit_scale=True, disable=None) as progress:
        for name, tensor in weights.items():
            if not tensor.is_floating_point() or not torch.stack(tensor.aminmax()).isfinite().all():
                raise ValueError(f"`{name}` has values that are not finite floats. Is the checkpoint damaged?")
            progress.update(tensor.nbytes)
    if "pos_embed" in weights:
        _check_positions(weights["pos_embed"])
    transformer.load_state_dict(weights, assign=True)


def _check_positions(table: torch.Tensor):
    difference = (table.float() - _position_table(math.isqrt(table.shape[1]), table.shape[2])).abs().max().item()
    if difference > POSITION_TOLERANCE:
        raise ValueError(
            f"`pos_embed` differs by {difference:.1e} from the table of sines and cosines, at most"
            f" {POSITION_TOLERANCE} of rounding was expected. The network's positions are others, or the checkpoint is"
            " damaged."
        )


def _read_labels(source: str, num_classes: int) -> dict[int, str]:
    """Return the name of each class id, from a file or from a pipeline's index."""
    try:
        is_file = os.path.isfile(source)
        content = json.loads(Path(source).read_text()) if is_file else DiffusionPipeline.load_config(source)
        id2label = {int(i): str(name) for i, name in content.get("id2label", content).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"There are no labels '{source}' ({str(error).splitlines()[0]}). Pass a JSON file with an object from id"
            " to name, a pipeline's folder or Hub repository with `id2label`, or `--labels none`."
        ) from error
    if unknown := sorted(id2label.keys() - set(range(num_classes + 1))):
        raise ValueError(
            f"The labels '{source}' name {len(id2label)} classes, {unknown[0]} among them, but the network has"
            f" {num_classes}. Pass its own as `--labels FILE`, or `--labels none`."
        )
    return id2label


def _check_vae(source: str, in_channels: int):
    """Raise before the long part of the work if the autoencoder is not there, or makes other latents."""
    try:
        config = AutoencoderKL.load_config(source)
    except OSError as error:
        raise ValueError(
            f"There is no autoencoder '{source}' ({str(error).splitlines()[0]}). Pass a folder or Hub repository, or"
            " `--vae none`."
        ) from error
    if config["latent_channels"] != in_channels:
        raise ValueError(
            f"The autoencoder '{source}' has latents of {config['latent_channels']} channels, the network"
            f" {in_channels}. Pass the one that it was trained with, or `--vae none`."
        )


def _write(folder: Path, transformer, model: str, vae: str | None, id2label: dict[int, str] | None):
    """Write the pipeline part by part: the network's weights leave memory before the autoencoder's come."""
    transformer.save_pretrained(folder / "transformer")
    transformer.to("meta")
    scheduler = FlowMatchEulerDiscreteScheduler()
    if model == "dit":
        scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    autoencoder = None
    if vae is not None:
        autoencoder = AutoencoderKL.from_pretrained(vae)
        autoencoder.save_pretrained(folder / "vae")
    pipe = ClassToImagePipeline(
        transformer, scheduler, autoencoder, id2label, guidance_channels=None if model == "flowdcn" else 3
    )
    pipe.save_config(folder)
