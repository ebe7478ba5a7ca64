"""
Turn a checkpoint of SiT, DiT or FlowDCN into a pipeline folder.

    python -m diffusers_searched_solver.convert --model sit --checkpoint SiT-XL-2-256.pt --output SiT-XL-2-256

The folder is what `ClassToImagePipeline.from_pretrained` loads, and `search/run.py --pipeline` takes.
"""

import argparse
import sys

from .conversion import FLOWDCN_SAMPLE_SIZE, LABELS, MODELS, VAE, convert


__all__ = ["add_arguments", "convert", "main", "run"]


def add_arguments(parser: argparse.ArgumentParser):
    """The arguments of `convert`, on any command line."""
    add = parser.add_argument
    add("--model", required=True, choices=MODELS, help="whose weights they are")
    add("--checkpoint", required=True, help="a file, or a folder in diffusers' layout")
    add("--output", required=True, help="the pipeline folder to write")
    add(
        "--vae",
        type=_or_none,
        default=VAE,
        help=f"folder or Hub repository of the autoencoder, or none (default: {VAE})",
    )
    add(
        "--labels",
        type=_or_none,
        default=LABELS,
        help=f"JSON file, or pipeline with the names, or none (default: {LABELS})",
    )
    add("--num-heads", type=int, help="attention heads, for a width that is none of the published ones")
    add("--sample-size", type=int, help=f"FlowDCN's latent size (default: {FLOWDCN_SAMPLE_SIZE}; 64 for 512 pixels)")


def main(arguments: list[str] | None = None):
    """Convert what the command line names; an error ends it with one line and a status of 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(output: str, **arguments):
    """Convert, and say how to load the result."""
    convert(output=output, **arguments)
    print(f"Wrote '{output}'. Load it with `ClassToImagePipeline.from_pretrained({output!r})`.")


def _or_none(name: str) -> str | None:
    return None if name == "none" else name
