"""An image from a text with a searched solver: Stable Diffusion 1.5, XL and 3, Flux and their like.

    python examples/text_to_image.py stabilityai/stable-diffusion-xl-base-1.0 out "a lighthouse"

where `out` is what `search/run.py --pipeline stabilityai/stable-diffusion-xl-base-1.0 --prompts ...` has written.
"""

import argparse

import torch
from diffusers import AutoPipelineForText2Image

from diffusers_searched_solver import SearchedSolverScheduler


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("pipeline", help="a Hub repository or a folder")
add("solver", help="what was searched for it: a folder, a Hub repository or a bundled solver")
add("prompt", help="what to show")
add("--num-steps", type=int, default=8, help="one of the step counts of the solver (default: 8)")
add("--guidance-scale", type=float, help="the one that the solver was searched with (default: the pipeline's own)")
add("--size", type=int, help="width and height in pixels (default: the pipeline's own)")
add("--seed", type=int, default=0, help="of the noise (default: 0)")
add("--output", default="text_to_image.png", help="default: text_to_image.png")
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
pipe = AutoPipelineForText2Image.from_pretrained(args.pipeline, dtype=torch.bfloat16 if on_gpu else torch.float32)
if on_gpu:
    pipe.enable_model_cpu_offload()  # one network on the GPU at a time

# The tables are the solver's; the noise process and what the network predicts are the pipeline's. If they do not go
# together, this says so.
solver_file = SearchedSolverScheduler.from_pretrained(args.solver).solver_file
pipe.scheduler = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=solver_file)

call_kwargs = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
image = pipe(
    prompt=args.prompt,
    width=args.size,
    height=args.size,
    num_inference_steps=args.num_steps,
    generator=torch.Generator().manual_seed(args.seed),
    **call_kwargs,
).images[0]
image.save(args.output)
