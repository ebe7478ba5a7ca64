"""
How much longer a search takes than the network calls that it makes: `python tests/benchmarks/search_overhead.py`.

The network is SiT-B/2 at 256 px (12 blocks, 768 wide) with random weights, in float32 on one thread of the CPU. Every
call is timed while the search runs, so that other load falls on both alike. Some 25 minutes.
"""

import time

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from model_speed import contenders

from diffusers_searched_solver.pipelines import ClassToImagePipeline
from search import find_solver


NUM_STEPS, MAX_CALLS, TEACHER_STEPS = 2, 900, 8


def measure() -> tuple[float, float, int]:
    """Seconds of a search and of its calls of the network, and how many these were."""
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    pipe = ClassToImagePipeline(contenders()["SiT-B/2"], FlowMatchEulerDiscreteScheduler(), vae)
    pipe.set_progress_bar_config(disable=True)
    began, in_network = [], []
    pipe.transformer.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
    pipe.transformer.register_forward_hook(lambda *_: in_network.append(time.perf_counter() - began[-1]))
    conditions = [{"class_labels": [label], "guidance_scale": 1.0} for label in range(10)]
    started = time.perf_counter()
    find_solver(pipe, NUM_STEPS, conditions, MAX_CALLS, teacher_steps=TEACHER_STEPS, log=None)
    return time.perf_counter() - started, sum(in_network), len(in_network)


def main():
    torch.set_num_threads(1)
    whole, network, calls = measure()
    print(
        f"SiT-B/2, {NUM_STEPS} steps: {whole:.1f} s, of which {network:.1f} s in {calls:,} calls of the network: "
        f"{100 * (whole / network - 1):.1f} % more than the calls alone"
    )


if __name__ == "__main__":
    main()
