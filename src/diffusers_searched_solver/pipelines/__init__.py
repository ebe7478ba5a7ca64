"""Pipelines that diffusers does not have."""

from .pipeline_class_to_image import ClassToImagePipeline


__all__ = ["ClassToImagePipeline"]
