"""A pipeline whose flow is known: from noise to a mixture of two Gaussians, in as many dimensions as wanted."""

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor


DIMENSIONS = 64


class MixtureVelocity(torch.nn.Module):
    """
    E[noise - data | x] at sigma, where data is of two Gaussians and x = (1 - sigma) D + sigma E.

    Args:
        distance, spread (`float`): Of their means from the origin, and their deviation.
    """

    def __init__(self, distance: float, spread: float):
        super().__init__()
        self.spread = spread
        means = torch.randn(2, DIMENSIONS, generator=torch.Generator().manual_seed(0))
        self.register_buffer("means", means / means.norm(dim=1, keepdim=True) * distance)

    def forward(self, x, sigma):
        variance = (1 - sigma) ** 2 * self.spread**2 + sigma**2
        offsets = x[:, None] - (1 - sigma) * self.means
        shares = (-offsets.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
        data = self.means + (1 - sigma) * self.spread**2 / variance * offsets
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


def mixture_pipeline(distance: float = 3.0, spread: float = 0.3) -> MixturePipeline:
    """One. The further apart and the narrower its Gaussians are, the harder are the noises that lie between them."""
    return MixturePipeline(MixtureVelocity(distance, spread), FlowMatchEulerDiscreteScheduler())
