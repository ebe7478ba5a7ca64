"""A pipeline whose flow is known: from noise to a mixture of two Gaussians, in as many dimensions as wanted."""

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor


DIMENSIONS = 64
SPREAD = 0.3


class MixtureVelocity(torch.nn.Module):
    """
    E[noise - data | x] at sigma, where data is of two Gaussians of deviation `SPREAD` and x = (1 - sigma) D + sigma E.
    """

    def __init__(self):
        super().__init__()
        means = torch.randn(2, DIMENSIONS, generator=torch.Generator().manual_seed(0))
        self.register_buffer("means", means / means.norm(dim=1, keepdim=True) * 3)

    def forward(self, x, sigma):
        variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
        offsets = x[:, None] - (1 - sigma) * self.means
        shares = (-offsets.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
        data = self.means + (1 - sigma) * SPREAD**2 / variance * offsets
        noise = sigma / variance * offsets
        return (shares * (noise - data)).sum(1)


class MixturePipeline(DiffusionPipeline):
    """Returns states of shape (batch, DIMENSIONS)."""

    def __init__(self, velocity, scheduler):
        super().__init__()
        self.register_modules(velocity=velocity, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator=None, num_inference_steps=50):
        self.scheduler.set_timesteps(num_inference_steps)
        generators = generator if isinstance(generator, list) else [generator]
        x = randn_tensor((len(generators), DIMENSIONS), generators)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.velocity(x, t / 1000), t, x, return_dict=False)[0]
        return x


def mixture_pipeline() -> MixturePipeline:
    """One."""
    return MixturePipeline(MixtureVelocity(), FlowMatchEulerDiscreteScheduler())
