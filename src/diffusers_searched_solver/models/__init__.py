"""Models that diffusers does not have."""

from .sit_transformer_2d import SiTTransformer2DModel


__all__ = ["SiTTransformer2DModel"]
