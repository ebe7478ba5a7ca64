"""The operator of FlowDCN: a query sums a few samples of the feature map, at positions that it chose itself."""

import torch
import torch.nn.functional as F


def deformable_convolution(values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""
    Sum K weighted samples of a feature map v, separately for every query (row i, column j) and group,

        out_ij = sum_k w_ijk sum_{a,b in 0,1} f_a(y) f_b(x) v[trunc(y) + a, trunc(x) + b]

    where x = j + dx_ijk, y = i + dy_ijk, f_1(x) = x - trunc(x), f_0 = 1 - f_1, and v is zero outside of the map.

    Truncation is towards zero, as in the official kernels. So this is bilinear interpolation inside of the map and
    beyond its far borders, but between -2 and 0 it is linear *extra*polation; `grid_sample` and every other operator
    that rounds down are another function there.

    An output is a weighted sum of 4K rows of a table, which is what `embedding_bag` computes without holding either
    the rows or a (tokens x tokens) matrix. Positions and sums are in float32 or finer, whatever the inputs and
    autocast are.

    Args:
        values (`torch.Tensor` of shape `(batch, rows, columns, groups, channels)`): The map v.
        offsets (`torch.Tensor` of shape `(batch, rows, columns, groups, K, 2)`): Each sample's (dx, dy), in tokens.
        weights (`torch.Tensor` of shape `(batch, rows, columns, groups, K)`): Each sample's w.

    Returns:
        `torch.Tensor` of the shape and dtype of `values`. Differentiable in all three inputs.

    Source:
        Wang et al., "Exploring DCN-like Architecture for Fast Image Generation with Arbitrary Resolution", NeurIPS
        2024, arXiv 2410.22655.
    """
    batch, rows, columns, groups, channels = values.shape
    dtype = torch.promote_types(values.dtype, torch.float32)
    int32 = {"dtype": torch.int32, "device": values.device}
    j, i = torch.arange(columns, **int32)[:, None, None], torch.arange(rows, **int32)[:, None, None, None]
    dx, dy = offsets.to(dtype).unbind(-1)
    across, down, weights = _neighbours(j + dx, columns), _neighbours(i + dy, rows), weights.to(dtype)

    # The table's row of token (i, j) in group g of sample n is ((n * rows + i) * columns + j) * groups + g.
    start = torch.arange(batch, **int32)[:, None, None, None, None] * (rows * columns * groups)
    start = start + torch.arange(groups, **int32)[:, None]
    index = torch.cat([start + (y * columns + x) * groups for y, _ in down for x, _ in across], dim=-1)
    factor = torch.cat([weights * fy * fx for _, fy in down for _, fx in across], dim=-1)
    table = values.to(dtype).reshape(-1, channels)
    sums = F.embedding_bag(index.flatten(0, 3), table, per_sample_weights=factor.flatten(0, 3), mode="sum")
    return sums.view_as(values).to(values.dtype)


def _neighbours(position: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the two cells around a position and the factor of each; outside of the map 0, on a cell inside of it."""
    first = position.trunc()
    rest = position - first
    pairs = []
    for cell, factor in ((first, 1 - rest), (first + 1, rest)):
        # To int before the clamp: then not even a position that is nan leads out of the table.
        inside = cell.int().clamp(0, size - 1)
        pairs.append((inside, factor * (inside == cell)))
    return pairs
