"""Two schedulers side by side in the browser: same noise, any step counts, errors to a many-step run, and times.

    pip install -e ".[examples]"
    python examples/app.py

`--pipeline` and `--solver` take a model of yours.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.calls import build_conditions
from search.known.baselines import diffusers_schedulers
from search.pipeline.loading import load_pipeline
from search.results.images import ERROR_GAIN, error_films, sample_films, strip


HERE = Path(__file__).parent
MANY_STEPS = 128
MIN_SIDE = 256  # pixels; smaller images are enlarged
TIMED = 3  # runs, of which the median is shown
INTRODUCTION = (
    f"Both schedulers begin at the same noise; what they should end at is the image of {MANY_STEPS} steps. The nearer "
    "with fewer steps, the better: the lower row shows what is missing."
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("--pipeline", default=str(HERE / "digits-sit"), help="a folder or a Hub repository (default: digits-sit)")
add("--solver", default=HERE / "results" / "digits-sit", help="a folder, a bundled solver or a Hub repository")
add("--guidance-scale", type=float, default=2.0, help="as in the search (default: 2)")
add("--port", type=int, default=7860, help="default: 7860")
args = parser.parse_args()

pipe = load_pipeline(args.pipeline, None, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
config = pipe.scheduler.config
solver_file = SearchedSolverScheduler.from_pretrained(args.solver).solver_file
schedulers = {
    "searched": SearchedSolverScheduler.from_config(config, solver=solver_file),
    "the pipeline's own": pipe.scheduler,
}
for family, settings in diffusers_schedulers(config).items():
    schedulers |= {f"{family}, {setting}": scheduler for setting, scheduler in settings.items()}
labels = getattr(pipe, "labels", {})


def sample(scheduler, num_steps, subject, seed):
    """An image or a video of a prompt or a class."""
    words = {"class_labels": [subject], "prompts": None} if labels else {"class_labels": None, "prompts": [subject]}
    (condition,) = build_conditions(pipe, **words, guidance_scale=args.guidance_scale, call_kwargs={})
    return sample_films(pipe, scheduler, condition, [seed], num_steps)[0]


@functools.lru_cache
def sample_many_steps(subject, seed):
    return sample(SearchedSolverScheduler.from_config(config), MANY_STEPS, subject, seed)


def enlarged(film):
    image = strip(film)
    scale = max(1, MIN_SIDE // image.height)
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def draw_goal(subject, seed):
    """What schedulers should end at."""
    return enlarged(sample_many_steps(subject, seed))


def draw(subject, seed, name, num_steps):
    """What one scheduler makes, how it differs, its error, and what it took."""
    goal = sample_many_steps(subject, seed)  # also makes the network warm
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        film = sample(schedulers[name], num_steps, subject, seed)
        seconds.append(time.perf_counter() - start)
    difference = [np.float64(frame) - np.float64(of_goal) for frame, of_goal in zip(film, goal, strict=True)]
    error = np.sqrt(np.square(np.divide(difference, 255)).mean())
    (errors,) = error_films([film], [goal])
    text = f"error {error:.4f} to {MANY_STEPS} steps, {statistics.median(seconds):.2f} s (median of {TIMED})"
    return enlarged(film), enlarged(errors), text


picture = functools.partial(gr.Image, format="png", buttons=["download"], interactive=False)

with gr.Blocks(title="Schedulers side by side", analytics_enabled=False) as app:
    gr.Markdown(f"# Schedulers side by side\n{INTRODUCTION}")
    with gr.Row():
        subject = gr.Dropdown(sorted(labels, key=labels.get), label="Class") if labels else gr.Textbox(label="Prompt")
        seed = gr.Number(100, label="Seed", precision=0, minimum=0)  # the search has fitted the first few
        button = gr.Button("Sample", variant="primary")
    with gr.Row():
        # One at a time: all use the one pipeline.
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "pipeline"}
        with gr.Column():
            button.click(draw_goal, [subject, seed], picture(label=f"{MANY_STEPS} steps"), **one_at_a_time)
        for name in ("searched", "the pipeline's own"):
            with gr.Column():
                scheduler = gr.Dropdown(list(schedulers), value=name, label="Scheduler")
                num_steps = gr.Slider(2, 50, value=5, step=1, label="Steps")
                outputs = [
                    picture(label="Image"),
                    picture(label=f"Its difference, times {ERROR_GAIN}"),
                    gr.Textbox(label="Result", interactive=False),
                ]
            button.click(draw, [subject, seed, scheduler, num_steps], outputs, **one_at_a_time)

app.launch(server_port=args.port, show_error=True)
