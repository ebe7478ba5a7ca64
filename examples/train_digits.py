"""Train the two small pipelines that ship in this folder, on scikit-learn's 1,797 images of handwritten digits.

    python examples/train_digits.py

writes `digits-dit/` (a stock `DiTPipeline`, noise prediction on the variance-preserving process), `digits-sit/`
(`ClassToImagePipeline` with SiT, velocity of the flow) and `digits_report.json`. Both pipelines share one small
autoencoder. Needs scikit-learn; takes about ten minutes on one CPU core. No image of the held-out 297 is seen by any
training.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusers_searched_solver.models import SiTTransformer2DModel
from diffusers_searched_solver.pipelines import ClassToImagePipeline


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ID2LABEL = dict(enumerate(NAMES))
IMAGE_SIZE, LATENT_SIZE, LATENT_CHANNELS = 16, 8, 4
NUM_COPIES = 20  # jittered copies of each training image
LABEL_DROPOUT = 0.1


def load_images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return train images, train labels, held-out images, held-out labels; images are (n, 1, 16, 16) in [-1, 1]."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bicubic").clamp(-1, 1)
    labels = torch.from_numpy(digits.target)
    train, held_out = train_test_split(np.arange(len(labels)), test_size=297, stratify=labels, random_state=0)
    return images[train], labels[train], images[held_out], labels[held_out]


def jitter(images: torch.Tensor) -> torch.Tensor:
    """Turn by up to 5 degrees, scale by up to 5 %, shear by up to 0.05 and shift by up to half a pixel, at random."""

    def spread(half_width: float) -> torch.Tensor:
        return half_width * (2 * torch.rand(len(images)) - 1)

    angle, shear, shift_x, shift_y = spread(0.087), spread(0.05), spread(1 / IMAGE_SIZE), spread(1 / IMAGE_SIZE)
    scale_x, scale_y = 1 + spread(0.05), 1 + spread(0.05)
    matrix = torch.stack(
        [
            torch.stack([scale_x * angle.cos(), shear - angle.sin(), shift_x], dim=-1),
            torch.stack([angle.sin(), scale_y * angle.cos(), shift_y], dim=-1),
        ],
        dim=-2,
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1


def train_autoencoder(images: torch.Tensor, num_steps: int) -> AutoencoderKL:
    """Train on jittered images, then scale the latents of `images` to unit variance by `config.scaling_factor`."""
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.05)
    for _ in range(num_steps):
        x = jitter(images[torch.randint(len(images), (32,))])
        posterior = vae.encode(x).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, x) + 1e-4 * posterior.kl().mean() / LATENT_SIZE**2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=round(1 / vae.encode(images).latent_dist.mode().std().item(), 5))
    return vae


def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return vae.config.scaling_factor * torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(500)])


def new_dit() -> DiTTransformer2DModel:
    """Build the stock DiT and start it as the official code does, with every block the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_embeds_ada_norm=1000,  # `DiTPipeline` takes 1000 for the null class
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def new_sit() -> SiTTransformer2DModel:
    return SiTTransformer2DModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_classes=10,
        learn_sigma=False,
    )


def dit_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the noise prediction at time index floor(1000 u)."""
    t = (1000 * u).long()
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t][:, None, None, None]
    return F.mse_loss(model(abar.sqrt() * x + (1 - abar).sqrt() * noise, t, class_labels=y).sample, noise)


def sit_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the velocity data - noise at time u."""
    t = u[:, None, None, None]
    return F.mse_loss(model(t * x + (1 - t) * noise, u, y).sample, x - noise)


def train_transformer(model, loss_of, null_class: int, latents: torch.Tensor, labels: torch.Tensor, num_steps: int):
    """Train and return the exponential moving average, with the class replaced by the null class now and then.

    The model stays in eval mode: in train mode the stock DiT drops labels by itself, another one in each block.
    """
    model.eval()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.03)
    for step in range(num_steps):
        batch = torch.randint(len(latents), (64,))
        x, y = latents[batch], labels[batch]
        y = torch.where(torch.rand(len(y)) < LABEL_DROPOUT, null_class, y)
        loss = loss_of(model, x, y, torch.rand(len(x)), torch.randn_like(x))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 1000 == 0:
            print(f"    step {step:5d}  loss {loss.item():.4f}", flush=True)
    return average.module.eval().requires_grad_(False)


@torch.no_grad()
def denoising_loss(model, loss_of, latents: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the loss over 40 noise levels an image, the same levels and the same noise for every data set."""
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for i in range(40):
        noise = torch.randn(latents.shape[1:], generator=generator).expand_as(latents)
        total += loss_of(model, latents, labels, torch.full((len(latents),), (i + 0.5) / 40), noise).item()
    return total / 40


def generate(pipe, guidance_scale: float, num_per_class: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (n, 1, 16, 16) in [-1, 1] of 50 steps, and the classes they were asked to show."""
    labels = torch.arange(10).repeat(num_per_class)
    generator = torch.Generator().manual_seed(2)
    images = pipe(labels.tolist(), guidance_scale=guidance_scale, generator=generator, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, labels


def nearest_distance(images: torch.Tensor, train_images: torch.Tensor) -> torch.Tensor:
    return torch.cdist(images.flatten(1), train_images.flatten(1)).amin(dim=1)


def report(pipe, model, loss_of, data, latents) -> dict:
    """Measure what a reader has to know of a shipped model: fit, memorisation and faithfulness to the class."""
    (train_images, train_labels, held_images, held_labels), (train_latents, held_latents) = data, latents
    classifier = SVC(C=10).fit(train_images.flatten(1).numpy(), train_labels.numpy())
    result = {
        "train_loss": denoising_loss(model, loss_of, train_latents, train_labels),
        "held_out_loss": denoising_loss(model, loss_of, held_latents, held_labels),
        "classifier_held_out_accuracy": classifier.score(held_images.flatten(1).numpy(), held_labels.numpy()),
        "guidance": {},
    }
    held_distance = nearest_distance(held_images, train_images)
    for guidance_scale in (1.0, 2.0, 4.0):
        images, labels = generate(pipe, guidance_scale)
        distance = nearest_distance(images, train_images)
        result["guidance"][str(guidance_scale)] = {
            "recognised": classifier.score(images.flatten(1).numpy(), labels.numpy()),
            "nearest_training_image_median_ratio": (distance.median() / held_distance.median()).item(),
            "closer_than_1st_percentile_of_held_out": (distance < held_distance.quantile(0.01)).float().mean().item(),
        }
    return result


def rounded(figures):
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    return round(figures, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--autoencoder-steps", type=int, default=800)
    parser.add_argument("--transformer-steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sums in the same order on every machine
    start = time.time()

    data = train_images, train_labels, held_images, _ = load_images()
    vae = train_autoencoder(train_images, args.autoencoder_steps)
    error = (vae.decode(vae.encode(held_images).latent_dist.mode()).sample.clamp(-1, 1) - held_images).square().mean()
    figures = {"autoencoder": {"scaling_factor": vae.config.scaling_factor, "held_out_rmse": error.sqrt().item()}}
    print(f"{time.time() - start:4.0f} s  autoencoder {figures['autoencoder']}", flush=True)

    latents = encode(vae, train_images), encode(vae, held_images)
    pool = encode(vae, jitter(train_images.repeat(NUM_COPIES, 1, 1, 1)))
    pool_labels = train_labels.repeat(NUM_COPIES)
    dit_scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    for name, model, loss_of, null_class, pipeline_class, scheduler in (
        ("digits-dit", new_dit(), dit_loss, 1000, DiTPipeline, dit_scheduler),
        ("digits-sit", new_sit(), sit_loss, 10, ClassToImagePipeline, FlowMatchEulerDiscreteScheduler()),
    ):
        model = train_transformer(model, loss_of, null_class, pool, pool_labels, args.transformer_steps)
        pipe = pipeline_class(transformer=model, vae=vae, scheduler=scheduler, id2label=ID2LABEL)
        pipe.register_to_config(id2label=ID2LABEL)  # `DiTPipeline` does not save the names by itself
        pipe.save_pretrained(args.output / name)
        pipe.set_progress_bar_config(disable=True)
        figures[name] = report(pipe, model, loss_of, data, latents)
        print(f"{time.time() - start:4.0f} s  {name} {json.dumps(rounded(figures[name]), indent=2)}", flush=True)
    (args.output / "digits_report.json").write_text(json.dumps(rounded(figures), indent=2) + "\n")


if __name__ == "__main__":
    main()
