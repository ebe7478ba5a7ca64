"""Models that diffusers does not have."""

from .flowdcn_transformer_2d import FlowDCNTransformer2DModel
from .sit_transformer_2d import SiTTransformer2DModel


__all__ = ["FlowDCNTransformer2DModel", "SiTTransformer2DModel"]
