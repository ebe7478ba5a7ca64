"""Tiny networks with the weights of the official code, and what that code makes of their inputs."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusers_searched_solver.models import FlowDCNTransformer2DModel, SiTTransformer2DModel


FIXTURES = Path(__file__).parent / "fixtures"


def official(name: str) -> tuple[SiTTransformer2DModel | FlowDCNTransformer2DModel, dict[str, torch.Tensor]]:
    """Return the model ("sit", "dit" or "flowdcn") with the official weights of a fixture, and its tensors."""
    tensors = load_file(FIXTURES / f"{name}_tiny.safetensors")
    common = {"sample_size": 8, "num_layers": 2, "num_classes": 10}
    if name == "flowdcn":
        model = FlowDCNTransformer2DModel(**common, num_groups=2, hidden_size=32)
    else:
        prediction_type = "epsilon" if name == "dit" else "flow_prediction"
        heads = {"num_attention_heads": 4, "attention_head_dim": 8}
        model = SiTTransformer2DModel(**common, **heads, prediction_type=prediction_type)
    model.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    return model.eval(), tensors
