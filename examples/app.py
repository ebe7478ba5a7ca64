"""Two schedulers side by side in the browser: same noise, any step counts, with errors to a many-step run and times.

    pip install -e ".[examples]"
    python examples/app.py

`--pipeline` and `--solver` take a model of yours.
"""

import argparse
import functools
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
from search.results.images import sample_images


HERE = Path(__file__).parent
MANY_STEPS = 128
MIN_SIDE = 256  # pixels; smaller images are enlarged

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("--pipeline", default=str(HERE / "digits-sit"), help="a folder or a Hub repository (default: digits-sit)")
add("--solver", default=HERE / "results" / "digits-sit", help="a folder, a bundled solver or a Hub repository")
add("--guidance-scale", type=float, default=2.0, help="as in the search (default: 2)")
add("--port", type=int, default=7860, help="default: 7860")
args = parser.parse_args()

pipe = load_pipeline(args.pipeline, torch.float32, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
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
    """An image of a prompt or a class."""
    words = {"class_labels": [subject], "prompts": None} if labels else {"class_labels": None, "prompts": [subject]}
    (condition,) = build_conditions(pipe, **words, guidance_scale=args.guidance_scale, call_kwargs={})
    return sample_images(pipe, scheduler, condition, [seed], num_steps)[0]


@functools.lru_cache
def sample_many_steps(subject, seed):
    return sample(SearchedSolverScheduler.from_config(config), MANY_STEPS, subject, seed)


def draw(subject, seed, name, num_steps):
    """The image of one scheduler, its error, and what it took."""
    goal = sample_many_steps(subject, seed)
    start = time.perf_counter()
    image = sample(schedulers[name], num_steps, subject, seed)
    seconds = time.perf_counter() - start
    error = np.sqrt(np.square((np.float64(image) - np.float64(goal)) / 255).mean())
    scale = max(1, MIN_SIDE // min(image.size))
    image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    return image, f"error {error:.4f} to {MANY_STEPS} steps, {seconds:.2f} s"


with gr.Blocks(title="Schedulers side by side", analytics_enabled=False) as app:
    gr.Markdown("# Schedulers side by side")
    with gr.Row():
        subject = gr.Dropdown(sorted(labels, key=labels.get), label="Class") if labels else gr.Textbox(label="Prompt")
        seed = gr.Number(100, label="Seed", precision=0, minimum=0)  # the search has fitted the first few
        button = gr.Button("Sample", variant="primary")
    with gr.Row():
        for name in ("searched", "the pipeline's own"):
            with gr.Column():
                scheduler = gr.Dropdown(list(schedulers), value=name, label="Scheduler")
                num_steps = gr.Slider(2, 50, value=5, step=1, label="Steps")
                image = gr.Image(label="Image", format="png", buttons=["download"], interactive=False)
                text = gr.Textbox(label="Result", interactive=False)
            # One at a time: both use the one pipeline.
            inputs, outputs = [subject, seed, scheduler, num_steps], [image, text]
            button.click(draw, inputs, outputs, concurrency_limit=1, concurrency_id="pipeline")

app.launch(server_port=args.port, show_error=True)
