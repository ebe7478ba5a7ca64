"""Draw the same noises under diffusers' schedulers and a searched solver, with their errors to a many-step run.

    python examples/compare_schedulers.py
    python examples/compare_schedulers.py --pipeline facebook/DiT-XL-2-256 --solver dit-xl-2-256 --class-labels 207 360

Each of diffusers' schedulers runs at whichever of its settings (flow shift or spacing) comes nearest to the many-step
run on these very images, which is more than one knows beforehand. The error is the root mean square difference of
pixels between 0 and 1; pictures of it are shown beside the images.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.calls import build_conditions
from search.known.baselines import diffusers_schedulers
from search.pipeline.field import merge_conditions
from search.pipeline.loading import load_pipeline
from search.results.images import error_films, sample_films, strip


HERE = Path(__file__).parent
GAP, LABEL_WIDTH = 4, 180  # pixels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("--pipeline", default=str(HERE / "digits-sit"), help="a folder or a Hub repository (default: digits-sit)")
add("--solver", default=HERE / "results" / "digits-sit", help="a folder, a bundled solver or a Hub repository")
add("--num-steps", type=int, nargs="+", default=[5, 8], help="step counts (default: 5 8)")
add("--many-steps", type=int, default=128, help="of the run that all are measured by (default: 128)")
add("--class-labels", nargs="+", help="ids or names (default: all that the pipeline knows)")
add("--prompts", nargs="+", help="prompts, one for each image")
add("--guidance-scale", type=float, default=2.0, help="as in the search (default: 2)")
add("--output", default="compare_schedulers.png", help="default: compare_schedulers.png")
args = parser.parse_args()

pipe = load_pipeline(args.pipeline, None, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
config = pipe.scheduler.config
solver_file = SearchedSolverScheduler.from_pretrained(args.solver).solver_file
searched = SearchedSolverScheduler.from_config(config, solver=solver_file)
schedulers = {**diffusers_schedulers(config), "searched": {"": searched}}

conditions = build_conditions(pipe, args.class_labels, args.prompts, args.guidance_scale, {})
call_kwargs = functools.reduce(merge_conditions, conditions)
seeds = range(-len(conditions), 0)  # noises that no search has fitted: its seeds are not negative
goals = sample_films(pipe, SearchedSolverScheduler.from_config(config), call_kwargs, seeds, args.many_steps)


def distance(films, goals):
    """Root mean square difference of pixels, which are from 0 to 1."""
    pixels, of_goals = (np.stack([np.float64(frame) for film in each for frame in film]) for each in (films, goals))
    return np.sqrt(np.square((pixels - of_goals) / 255).mean())


def nearest(settings, num_steps):
    """Of the settings of one scheduler, the one nearest to the many-step run: error, name and images or videos."""
    runs = []
    for name, scheduler in settings.items():
        films = sample_films(pipe, scheduler, call_kwargs, seeds, num_steps)
        runs.append((distance(films, goals), name, films))
    return min(runs)


rows = [(f"{args.many_steps} steps", goals)]
for num_steps in args.num_steps:
    results = {family: nearest(settings, num_steps) for family, settings in schedulers.items()}
    for family, (error, setting, films) in sorted(results.items(), key=lambda item: item[1][0]):
        label = f"{num_steps} steps, error {error:.4f}\n{family}\n{setting}".strip()
        print(label.replace("\n", ", "))
        rows.append((label, films))

width, height = strip(goals[0]).size
scale = min(max(width, 64), 256) / width
tile = (round(width * scale), round(height * scale))
size = (LABEL_WIDTH + 2 * len(goals) * (tile[0] + GAP), len(rows) * (tile[1] + GAP))
picture = Image.new("RGB", size, "white")
draw = ImageDraw.Draw(picture)
for row, (label, films) in enumerate(rows):
    top = row * (tile[1] + GAP)
    draw.text((8, top + tile[1] // 2), label, fill="black", anchor="lm", font_size=14)
    errors = error_films(films, goals) if row else []
    for column, film in enumerate([*films, *errors]):
        resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        image = strip(film).convert("RGB").resize(tile, resampling)
        picture.paste(image, (LABEL_WIDTH + column * (tile[0] + GAP), top))
picture.save(args.output)
