"""Pipelines that diffusers does not have."""

from .pipeline_sit import SiTPipeline


__all__ = ["SiTPipeline"]
