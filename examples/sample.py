"""Load a pipeline, give it a searched solver, save an image.

    python examples/sample.py --class-labels 3 8 --num-steps 5

The pipeline and its solver lie beside this file; put yours in their place.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiTPipeline
from diffusers.utils import make_image_grid

from diffusers_searched_solver import SearchedSolverScheduler


HERE = Path(__file__).parent

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--class-labels", type=int, nargs="+", default=list(range(10)), help="digits (default: all)")
parser.add_argument("--num-steps", type=int, default=8, help="5, 8 or 10 (default: 8)")
parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
parser.add_argument("--output", default="sample.png", help="default: sample.png")
args = parser.parse_args()

pipe = DiTPipeline.from_pretrained(HERE / "digits-dit")
pipe.scheduler = SearchedSolverScheduler.from_pretrained(HERE / "results" / "digits-dit")

images = pipe(
    class_labels=args.class_labels,
    guidance_scale=2.0,
    num_inference_steps=args.num_steps,
    generator=torch.Generator().manual_seed(args.seed),
).images
make_image_grid(images, rows=1, cols=len(images), resize=64).save(args.output)
