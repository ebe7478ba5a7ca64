"""The two small trained pipelines of `examples/`: they load, they are small, and they draw the digit asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from diffusers_searched_solver.pipelines import ClassToImagePipeline


EXAMPLES = Path(__file__).parent.parent / "examples"
PIPELINES = {"digits-dit": DiTPipeline, "digits-sit": ClassToImagePipeline}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module", params=PIPELINES, ids=str)
def digits(request):
    pipe = PIPELINES[request.param].from_pretrained(EXAMPLES / request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", PIPELINES)
def test_a_shipped_pipeline_takes_at_most_three_megabytes(name):
    assert sum(path.stat().st_size for path in (EXAMPLES / name).rglob("*") if path.is_file()) <= 3_000_000


def test_a_shipped_pipeline_loads_in_float32_and_knows_its_classes(digits):
    assert {digits.transformer.dtype, digits.vae.dtype} == {torch.float32}
    assert digits.get_label_ids(NAMES) == list(range(10))


@pytest.mark.parametrize(
    "name, kind", [("digits-dit", DDIMScheduler), ("digits-sit", FlowMatchEulerDiscreteScheduler)]
)
def test_a_shipped_pipeline_has_the_scheduler_of_its_big_sister(name, kind):
    pipe = PIPELINES[name].from_pretrained(EXAMPLES / name)
    assert isinstance(pipe.scheduler, kind)
    if kind is DDIMScheduler:  # facebook/DiT-XL-2-256
        config = pipe.scheduler.config
        assert (config.beta_start, config.beta_end, config.beta_schedule) == (1e-4, 0.02, "linear")
        assert (config.prediction_type, config.clip_sample) == ("epsilon", False)


def test_samples_are_recognised_as_the_digit_asked_for(digits):
    real = load_digits()
    classifier = KNeighborsClassifier(1).fit(real.images.reshape(-1, 64) / 16, real.target)
    labels = list(range(10)) * 8
    generator = torch.Generator().manual_seed(0)
    images = digits(labels, guidance_scale=2.0, generator=generator, num_inference_steps=50, output_type="np").images
    small = F.avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2), 2).flatten(1).numpy()
    assert classifier.score(small, labels) >= 0.9


def test_two_seeds_of_one_class_are_two_images(digits):
    generator = torch.Generator().manual_seed(0)
    images = digits([3] * 8, guidance_scale=2.0, generator=generator, num_inference_steps=20, output_type="np").images
    distance = np.sqrt(((images[:, None] - images[None]) ** 2).mean(axis=(2, 3, 4)))
    assert distance[~np.eye(8, dtype=bool)].min() > 0.05  # of a range of 1


def test_the_report_shows_no_memorisation():
    figures = json.loads((EXAMPLES / "digits_report.json").read_text())
    for name in PIPELINES:
        guided = figures[name]["guidance"]["2.0"]
        assert guided["recognised"] >= 0.95
        assert guided["closer_than_1st_percentile_of_held_out"] <= 0.05
        assert figures[name]["held_out_loss"] <= 1.1 * figures[name]["train_loss"]
