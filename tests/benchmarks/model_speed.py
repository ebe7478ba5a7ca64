"""
How many tokens per second our transformers take forward, beside diffusers' DiT of the same size, paired in one run.

    python tests/benchmarks/model_speed.py

All are of size B/2 (12 blocks, 768 wide, 12 heads or groups, tokens of 2x2) with random weights, in float32 on one
thread of the CPU. Calls alternate, so that other load falls on all alike. Tokens per second are those of the fastest
call; a ratio is the median, over the rounds, of our speed over diffusers' in the same round.
"""

import statistics
import time

import torch
from diffusers import DiTTransformer2DModel

from diffusers_searched_solver.models import FlowDCNTransformer2DModel, SiTTransformer2DModel


LAYERS, HEADS, WIDTH, SIZE = 12, 12, 768, 32
ROUNDS = 15
BATCHES = [1, 2]


def contenders() -> dict[str, torch.nn.Module]:
    """Name to network, the reference first; no weight is left at zero, so that FlowDCN samples all over the map."""
    heads = {"num_layers": LAYERS, "num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS}
    models = {
        "diffusers' DiT-B/2": DiTTransformer2DModel(**heads, in_channels=4, out_channels=8, sample_size=SIZE),
        "SiT-B/2": SiTTransformer2DModel(**heads, sample_size=SIZE),
        "FlowDCN-B/2": FlowDCNTransformer2DModel(num_layers=LAYERS, num_groups=HEADS, hidden_size=WIDTH),
    }
    for model in models.values():
        for parameter in model.eval().requires_grad_(False).parameters():
            parameter.normal_(std=0.02)
    return models


@torch.inference_mode()
def seconds(model: torch.nn.Module, batch: int) -> float:
    """One forward pass."""
    inputs = torch.randn(batch, 4, SIZE, SIZE), torch.full((batch,), 0.5), torch.zeros(batch, dtype=torch.long)
    started = time.perf_counter()
    model(inputs[0], timestep=inputs[1], class_labels=inputs[2])
    return time.perf_counter() - started


def main():
    torch.set_num_threads(1)
    models = contenders()
    reference = next(iter(models))
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for batch in BATCHES:
        for model in models.values():
            seconds(model, batch)
        times = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, model in models.items():
                times[name].append(seconds(model, batch))
        print(f"\nbatch {batch}, latents {SIZE}x{SIZE}, float32, one CPU thread, {ROUNDS} alternating calls")
        print(f"{'network':20}{'tokens / s':>12}{'speed / DiT':>13}{'parameters':>13}{'/ DiT':>7}")
        for name, spent in times.items():
            speed = batch * (SIZE // 2) ** 2 / min(spent)
            ratio = statistics.median(t / own for t, own in zip(times[reference], spent, strict=True))
            print(f"{name:20}{speed:12.0f}{ratio:13.2f}{sizes[name]:13,}{sizes[name] / sizes[reference]:7.2f}")


if __name__ == "__main__":
    main()
