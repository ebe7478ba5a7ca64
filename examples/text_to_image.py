"""An image from a text with a searched solver: Stable Diffusion 1.5, XL and 3, Flux and their like.

    python examples/text_to_image.py stabilityai/stable-diffusion-xl-base-1.0 out "a lighthouse"
    python examples/text_to_image.py PixArt-alpha/PixArt-XL-2-512x512 dit-xl-2-256 "a lighthouse" --guidance-scale 2
    python examples/text_to_image.py stable-diffusion-v1-5/stable-diffusion-v1-5 "a lighthouse"

where `out` is what `search/run.py --pipeline stabilityai/stable-diffusion-xl-base-1.0 --prompts ...` has written.
Which of the three to take for which model is in `examples/README.md`.
"""

import argparse

import torch
from diffusers import AutoPipelineForText2Image

from diffusers_searched_solver import SearchedSolverScheduler


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("pipeline", help="a Hub repository or a folder")
add(
    "solver",
    nargs="?",
    help="a folder, a Hub repository or a bundled solver (default: none, a classical solver of any step count)",
)
add("prompt", help="what to show")
add("--num-steps", type=int, help="default: the solver's step count that is nearest to 8; 20 without a solver")
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
solver_file = args.solver and SearchedSolverScheduler.from_pretrained(args.solver).solver_file
pipe.scheduler = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=solver_file)

num_steps = args.num_steps or (min(solver_file.step_counts, key=lambda n: abs(n - 8)) if solver_file else 20)
call_kwargs = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
image = pipe(
    prompt=args.prompt,
    width=args.size,
    height=args.size,
    num_inference_steps=num_steps,
    generator=torch.Generator().manual_seed(args.seed),
    **call_kwargs,
).images[0]
image.save(args.output)
