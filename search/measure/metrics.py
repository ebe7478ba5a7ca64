"""
How near images are to others: pairs of images, and sets of images by the features that a network makes of them.

PSNR, SSIM, FID and the kernel of KID are torchmetrics'. It has no precision and recall, its KID also compares images
from one noise, and its inception score would run the network once more.
"""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_kernel


# Images that a KID is of, and rows whose distances to all others are in memory at a time.
BLOCK = 1000
ROWS = 250
NEIGHBOURS = 3
# Of fewer images, not all of the metrics are defined.
MIN_IMAGES = 8


def similarity(images: Tensor, goals: Tensor) -> dict[str, Tensor]:
    """
    Likeness of each image to its goal.

    Args:
        images, goals (`torch.Tensor`): Of shape (n, channels, h, w), in [0, 1].

    Returns:
        `psnr` in decibels and `ssim`, at most 1, both of shape (n,).
    """
    return {
        "psnr": peak_signal_noise_ratio(images, goals, data_range=1.0, reduction="none", dim=(1, 2, 3)),
        "ssim": structural_similarity_index_measure(images, goals, data_range=1.0, reduction="none").reshape(-1),
    }


def distribution_metrics(features: Tensor, reference: Tensor, device: torch.device) -> dict[str, float]:
    """
    How near a set of images is to another.

    Args:
        features (`torch.Tensor`): Of the images, shape (n, d), float32 on the CPU.
        reference (`torch.Tensor`): Those of the images that they should be like, shape (m, d).
        device: Where precision and recall are computed.
    """
    precision, recall = precision_and_recall(features.to(device), reference.to(device))
    return {
        "fid": frechet_distance(features, reference),
        "kid": kernel_distance(features, reference),
        "precision": precision,
        "recall": recall,
    }


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """
    FID: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), where m and C are mean and covariance of the features.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.
    """
    # Without the synchronisation that torchmetrics would wait for: this process has all features.
    metric = FrechetInceptionDistance(_FeaturesAtHand(features.shape[1]), sync_on_compute=False)
    for rows, real in ((reference, True), (features, False)):
        for block in rows.split(BLOCK):
            metric.update(block.double(), real=real)
    return float(metric.compute())


class _FeaturesAtHand(torch.nn.Identity):
    """What torchmetrics takes for a feature network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """
    KID: a mean over disjoint random blocks of at most 1000 images of

        1 / (m (m - 1)) sum_{i != j} k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j)

    with k(x, y) = (x . y / d + 1)^3: the squared maximum mean discrepancy, without bias. As i = j is left out, it has
    none either where x_i and y_i are images from one noise, and it is zero where they are the same.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018; Gretton et al., "A Kernel Two-Sample Test", 2012, lemma 6.
    """
    shorter = min(len(features), len(reference))
    size = min(BLOCK, shorter)
    # The same order for both if they are of one length, so that pairs from one noise stay together.
    orders = (torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)) for rows in (features, reference))
    blocks = (order[: shorter // size * size].split(size) for order in orders)
    values = [_discrepancy(features[a].double(), reference[b].double()) for a, b in zip(*blocks, strict=True)]
    return float(torch.stack(values).mean())


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    kernels = poly_kernel(x, x) + poly_kernel(y, y) - poly_kernel(x, y) - poly_kernel(y, x)
    return (kernels.sum() - kernels.trace()) / (len(x) * (len(x) - 1))


def precision_and_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """
    Precision: the share of images within the reference's manifold. Recall: the share of the reference within the
    images' manifold. A manifold is the union of balls around its points that reach to their third neighbour.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019.
    """
    reference_radii = _radii(reference)
    inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, radii in zip(features.split(ROWS), _radii(features).split(ROWS), strict=True):
        distances = torch.cdist(rows, reference)
        inside += int((distances <= reference_radii).any(1).sum())
        covered |= (distances <= radii[:, None]).any(0)
    return inside / len(features), float(covered.cpu().double().mean())


def _radii(rows: Tensor) -> Tensor:
    """Distance of each row to its third neighbour; the nearest is the row itself."""
    return torch.cat([torch.cdist(block, rows).kthvalue(NEIGHBOURS + 1).values for block in rows.split(ROWS)])


def inception_score(logits: Tensor) -> float:
    """
    exp(E_x KL(p(y | x) || p(y))), p(y) = E_x p(y | x), over all images at once.

    Source: Salimans et al., "Improved Techniques for Training GANs", 2016.
    """
    conditional = logits.double().softmax(1)
    entropy, conditional_entropy = (torch.special.entr(p).sum(-1) for p in (conditional.mean(0), conditional))
    return float((entropy - conditional_entropy.mean()).exp())
