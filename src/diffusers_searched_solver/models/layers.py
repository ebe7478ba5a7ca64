"""What SiT and FlowDCN have in common, with the parameter names of their official code."""

import math
from collections.abc import Callable

import torch
from torch import nn


class PatchEmbedder(nn.Module):
    def __init__(self, in_channels: int, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed latents of shape (batch, channels, height, width) as tokens (batch, rows, columns, width)."""
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


class TimeEmbedder(nn.Module):
    def __init__(self, width: int, num_frequencies: int = 128, max_period: float = 10000.0):
        super().__init__()
        self.num_frequencies, self.max_period = num_frequencies, max_period
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        nn.init.normal_(self.mlp[2].weight, std=0.02)

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """
        Embed as mlp([cos(t f), sin(t f)]), in float32 up to the MLP.

        Args:
            dtype: That the MLP computes in; its weights may be stored in another.
        """
        angles = t.float()[:, None] * self.frequencies(t.device)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(dtype))

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """Return f_k = max_period^(-k/K), K numbers, rounded as by the official code: t = 999 shows the last bit."""
        k = torch.arange(self.num_frequencies, dtype=torch.float32, device=device)
        return torch.exp(-math.log(self.max_period) * k / self.num_frequencies)


class ClassEmbedder(nn.Module):
    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)


class Block(nn.Module):
    def __init__(self, width: int, norm: Callable[[], nn.Module], attn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1 = norm()
        self.attn = attn
        self.norm2 = norm()
        self.mlp = mlp
        self.adaLN_modulation = _zero_linear_of_silu(width, 6 * width)

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Mix tokens, then channels; shift b, scale s and gate g of both come from c, which broadcasts with h."""
        b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        h = h + g1 * self.attn(self.norm1(h) * (1 + s1) + b1)
        return h + g2 * self.mlp(self.norm2(h) * (1 + s2) + b2)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = _zero_linear_of_silu(width, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        b, s = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(h) * (1 + s) + b)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Turn patches of shape (batch, rows, columns, p * p * channels) into (batch, channels, rows * p, columns * p)."""
    pixels = patches.unflatten(-1, (patch_size, patch_size, -1))
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _zero_linear_of_silu(width: int, out_features: int) -> nn.Sequential:
    """Return linear(silu(c)) that starts at zero, so that a new block is the identity."""
    linear = nn.Linear(width, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)
