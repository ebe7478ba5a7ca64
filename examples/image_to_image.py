"""An image from an image and a text with a searched solver: Stable Diffusion 1.5, XL and 3, Flux and their like.

    python examples/image_to_image.py stabilityai/stable-diffusion-xl-base-1.0 out sketch.png "a lighthouse"

where `out` is what `search/run.py --pipeline stabilityai/stable-diffusion-xl-base-1.0 --prompts ...` has written. Of a
solver's N steps the last N * strength are run, from the image with the noise of their first node. Searched nodes are
not spread evenly, so the same strength may begin at another noise level than with the pipeline's own scheduler: what
each strength begins with is printed.
"""

import argparse
import inspect

import torch
from diffusers import AutoPipelineForImage2Image
from diffusers.utils import load_image

from diffusers_searched_solver import SearchedSolverScheduler


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("pipeline", help="a Hub repository or a folder")
add("solver", help="what was searched for it: a folder, a Hub repository or a bundled solver")
add("image", help="a file or an address, of the size that is wanted")
add("prompt", help="what to make of it")
add("--strength", type=float, default=0.6, help="0 leaves the image as it is, 1 forgets it (default: 0.6)")
add("--num-steps", type=int, default=10, help="one of the step counts of the solver (default: 10)")
add("--guidance-scale", type=float, help="the one that the solver was searched with (default: the pipeline's own)")
add("--seed", type=int, default=0, help="of the noise (default: 0)")
add("--output", default="image_to_image.png", help="default: image_to_image.png")
args = parser.parse_args()
if not 1 <= args.num_steps * args.strength <= args.num_steps:
    parser.error(f"--strength is {args.strength}, expected 1/{args.num_steps} to 1 for {args.num_steps} steps")

on_gpu = torch.cuda.is_available()
pipe = AutoPipelineForImage2Image.from_pretrained(args.pipeline, dtype=torch.bfloat16 if on_gpu else torch.float32)
if on_gpu:
    pipe.enable_model_cpu_offload()  # one network on the GPU at a time

# The tables are the solver's; the noise process and what the network predicts are the pipeline's. If they do not go
# together, this says so.
solver_file = SearchedSolverScheduler.from_pretrained(args.solver).solver_file
pipe.scheduler = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=solver_file)

nodes = pipe.scheduler.solver_file.solvers[args.num_steps]
for step, (signal, noise) in enumerate(zip(nodes.alphas[:-1], nodes.sigmas[:-1], strict=True)):
    strength = 1 - step / args.num_steps
    print(f"strength {strength:.2f} begins at step {step + 1} with {signal:.2f} of the image and {noise:.2f} of noise")

image = load_image(args.image)
call_kwargs = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
if "width" in inspect.signature(pipe.__call__).parameters:
    call_kwargs |= {"width": image.width, "height": image.height}  # others take it from the image
result = pipe(
    prompt=args.prompt,
    image=image,
    strength=args.strength,
    num_inference_steps=args.num_steps,
    generator=torch.Generator().manual_seed(args.seed),
    **call_kwargs,
).images[0]
result.save(args.output)
