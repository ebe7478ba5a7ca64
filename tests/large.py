"""A pipeline whose states are large and whose network costs nothing: data of independent normal distributions."""

import resource
import sys
import tempfile

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor


class NormalVelocity(torch.nn.Module):
    """E[noise - data | x] at sigma, where x = (1 - sigma) D + sigma E and the deviations of D differ by element."""

    def __init__(self, elements: int):
        super().__init__()
        self.register_buffer("variances", torch.linspace(0.2, 1.5, elements).square())

    def forward(self, x, sigma):
        sigma = float(sigma)
        return x * (sigma - (1 - sigma) * self.variances) / ((1 - sigma) ** 2 * self.variances + sigma**2)


class LargePipeline(DiffusionPipeline):
    """Returns states of shape (batch, elements)."""

    def __init__(self, velocity, scheduler):
        super().__init__()
        self.register_modules(velocity=velocity, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator=None, num_inference_steps=50):
        self.scheduler.set_timesteps(num_inference_steps)
        generators = generator if isinstance(generator, list) else [generator]
        x = randn_tensor((len(generators), len(self.velocity.variances)), generators)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.velocity(x, t / 1000), t, x, return_dict=False)[0]
        return x


def large_pipeline(elements: int) -> LargePipeline:
    """One."""
    return LargePipeline(NormalVelocity(elements), FlowMatchEulerDiscreteScheduler())


def peak() -> int:
    """Bytes that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    # Prints how many bytes a search of a few steps holds beyond what a run of the pipeline with a batch does, and how
    # many with measuring.
    from search import find_solver, measure

    elements, num_steps, batch_size, max_calls = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    pipe = large_pipeline(elements)
    pipe([torch.Generator().manual_seed(k) for k in range(batch_size)], num_inference_steps=8)
    before = peak()
    found = find_solver(pipe, num_steps, [{}], max_calls=max_calls, batch_size=batch_size, teacher_steps=16)
    print(peak() - before)
    with tempfile.TemporaryDirectory() as folder:
        measure(pipe, found.solver, [{}], folder, batch_size=batch_size, teacher_steps=16)
    print(peak() - before)
