"""Limits of the data that a network predicts, as configs of pixel models ask for them (DeepFloyd-IF, DDPM)."""

from collections.abc import Mapping

import torch


LIMITS = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample", "clip_sample_range")


def has_limits(config: Mapping) -> bool:
    """Whether a scheduler's config asks for limited data."""
    return bool(config.get("thresholding") or config.get("clip_sample"))


def limited(data: torch.Tensor, config: Mapping) -> torch.Tensor:
    """
    Data within the limits of a config.

        thresholding   D' = clip(D, -s, s) / s   where s is a quantile of |D| in each sample, 1 to `sample_max_value`
        clip_sample    D' = clip(D, -r, r)       where r is `clip_sample_range`

    Args:
        data (`torch.Tensor`, shape (batch, ...)): D.

    Source: Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", arXiv
    2205.11487, section 2.3; the entries are those of `diffusers.DDPMScheduler`.
    """
    if not config.get("thresholding"):
        limit = config.get("clip_sample_range", 1.0)
        return data.clamp(-limit, limit)
    data = data.to(torch.promote_types(data.dtype, torch.float32))
    s = torch.quantile(data.flatten(1).abs(), config.get("dynamic_thresholding_ratio", 0.995), dim=1)
    s = s.clamp(min=1, max=config.get("sample_max_value", 1.0)).view(-1, *[1] * (data.ndim - 1))
    return data.clamp(-s, s) / s
