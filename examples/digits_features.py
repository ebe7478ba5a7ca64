"""
What the images of the shipped pipelines are measured with: a small classifier of scikit-learn's handwritten digits.

    python examples/digits_features.py

trains it in a few seconds and writes `digits_features.safetensors` beside this file, from which

    accelerate launch search/run.py --image-metrics 1000 --feature-network examples/digits_features.py ...

reads it. A feature network of your own is such a file: a function `feature_network` that returns a `torch.nn.Module`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


WEIGHTS = Path(__file__).with_suffix(".safetensors")
NUM_FEATURES = 32


class DigitsClassifier(nn.Module):
    """Of images (n, 3, 16, 16), uint8, the features (n, 32) and the logits of the ten digits (n, 10)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, NUM_FEATURES),
            nn.Tanh(),
        )
        self.logits = nn.Linear(NUM_FEATURES, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(images[:, :1] / 127.5 - 1)
        return features, self.logits(features)


def feature_network() -> nn.Module:
    """What `--feature-network` calls."""
    network = DigitsClassifier()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval().requires_grad_(False)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Grey images (n, 1, h, w) in [-1, 1] as the network takes them."""
    return (127.5 * (images + 1)).round().to(torch.uint8).expand(-1, 3, -1, -1)


def train(images: torch.Tensor, labels: torch.Tensor, num_steps: int = 1500) -> nn.Module:
    """Train on jittered images."""
    from train_digits import jitter  # which needs scikit-learn

    torch.manual_seed(0)
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps)
    for _ in range(num_steps):
        batch = torch.randint(len(images), (64,))
        _, logits = network(to_bytes(jitter(images[batch])))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def main():
    from train_digits import load_images

    torch.set_num_threads(1)  # sums in the same order on every machine
    train_images, train_labels, held_images, held_labels = load_images()
    network = train(train_images, train_labels)
    recognised = network(to_bytes(held_images))[1].argmax(1) == held_labels
    save_file(network.state_dict(), WEIGHTS)
    print(f"{recognised.float().mean():.3f} of the held-out digits are recognised. Wrote {WEIGHTS}.")


if __name__ == "__main__":
    main()
