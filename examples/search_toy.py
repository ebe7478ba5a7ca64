"""The whole line on a problem whose answer is known: search a solver for a mixture of Gaussians in the plane.

    python examples/search_toy.py

The network of this pipeline is a formula: the exact velocity of the flow from noise to the mixture. The picture shows
what a solver has to reach (many steps), where Euler ends in a few steps, and where the searched solver ends.
"""

import argparse
import math

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageDraw

from diffusers_searched_solver import SearchedSolverScheduler
from search import search_solver


TEACHER_STEPS = 256
SIDE, SPAN = 480, 3.2  # of a panel, in pixels; what it shows, from -SPAN to SPAN
GREY, BLUE, RED, INK = (170, 170, 170), (40, 90, 200), (200, 40, 40), (20, 20, 20)


class MixtureVelocity(torch.nn.Module):
    r"""
    The velocity noise - data, expected at a point x of time t, of

        x = (1 - t) data + t noise,  data ~ 1/K sum_k N(m_k, s^2)

        v(x, t) = sum_k w_k (((t - (1 - t) s^2) / var) (x - (1 - t) m_k) - m_k)
        where var = (1 - t)^2 s^2 + t^2  and  w = softmax_k(-|x - (1 - t) m_k|^2 / (2 var))
    """

    def __init__(self, num_components: int = 5, radius: float = 2.0, deviation: float = 0.25):
        super().__init__()
        angles = 2 * math.pi * torch.arange(num_components) / num_components
        self.means = torch.nn.Buffer(radius * torch.stack([angles.sin(), -angles.cos()], dim=1))
        self.deviation = deviation

    def forward(self, x, t):
        var = ((1 - t) * self.deviation) ** 2 + t**2
        offsets = x[:, None] - (1 - t) * self.means
        weights = torch.softmax(-offsets.square().sum(-1) / (2 * var), dim=1)
        velocities = (t - (1 - t) * self.deviation**2) / var * offsets - self.means
        return (weights[..., None] * velocities).sum(1)


class MixturePipeline(DiffusionPipeline):
    """All that the search needs of a pipeline: a scheduler, and a call that makes a sample for each generator."""

    def __init__(self, velocity, scheduler):
        super().__init__()
        self.register_modules(velocity=velocity, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps):
        """The states of every sample at every node, shape (num_inference_steps + 1, samples, 2)."""
        self.scheduler.set_timesteps(num_inference_steps)
        count = len(generator) if isinstance(generator, list) else 1
        states = [randn_tensor((count, 2), generator)]
        for t in self.scheduler.timesteps:
            output = self.velocity(states[-1], t / self.scheduler.config.num_train_timesteps)
            states.append(self.scheduler.step(output, t, states[-1], return_dict=False)[0])
        return torch.stack(states)


def draw_panel(title, trajectories, goals):
    """Trajectories in blue, the goals of their ends in grey, and in red how far they miss them."""
    panel = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
    draw = ImageDraw.Draw(panel)
    pixels = ((trajectories / SPAN + 1) * SIDE).transpose(0, 1).tolist()
    for path, (x, y) in zip(pixels, ((goals / SPAN + 1) * SIDE).tolist(), strict=True):
        draw.line([tuple(point) for point in path], fill=BLUE, width=2)
        draw.line([tuple(path[-1]), (x, y)], fill=RED, width=6)
        draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=GREY)
    draw.text((SIDE, 40), title, fill=INK, anchor="mm", font_size=36)
    return panel.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num-steps", type=int, nargs="+", default=[4, 5], help="step counts to search (default: 4 5)")
parser.add_argument("--output", default="search_toy.png", help="default: search_toy.png")
args = parser.parse_args()

pipe = MixturePipeline(MixtureVelocity(), FlowMatchEulerDiscreteScheduler())
config = pipe.scheduler.config
solvers = {n: search_solver(pipe, n, conditions=[{}], batch_size=64, log=print) for n in args.num_steps}


def run(scheduler, num_steps):
    """Trajectories of a hundred noises that the search has not seen: its seeds are not negative."""
    pipe.scheduler = scheduler
    return pipe([torch.Generator().manual_seed(seed) for seed in range(-100, 0)], num_steps)


teacher = run(SearchedSolverScheduler.from_config(config), TEACHER_STEPS)
picture = Image.new("RGB", (3 * SIDE, len(solvers) * SIDE))
for row, (num_steps, solver) in enumerate(solvers.items()):
    picture.paste(draw_panel(f"{TEACHER_STEPS} steps", teacher, teacher[-1]), (0, row * SIDE))
    searched = SearchedSolverScheduler.from_config(config, solver=solver)
    for column, name, scheduler in ((1, "Euler", FlowMatchEulerDiscreteScheduler()), (2, "searched", searched)):
        trajectories = run(scheduler, num_steps)
        error = (trajectories[-1] - teacher[-1]).square().mean().sqrt()
        caption = f"{name}, {num_steps} steps: error {error:.3f}"
        print(caption)
        picture.paste(draw_panel(caption, trajectories, teacher[-1]), (column * SIDE, row * SIDE))
picture.save(args.output)
