"""Image metrics: the formulas against their definitions, and the measurement that streams images through them."""

import gc
import math
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import build
from torch import nn
from torchmetrics.image.inception import InceptionScore

from diffusers_searched_solver import SearchedSolverScheduler, process_from_config
from diffusers_searched_solver.calls import build_conditions
from diffusers_searched_solver.teacher import teacher_solver
from search.measure import image_metrics
from search.measure.feature_network import FeatureNetwork
from search.measure.image_metrics import ImageSettings, format_metrics, load_feature_network, measure_images
from search.measure.metrics import (
    BLOCK,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
    similarity,
)
from search.pipeline.field import NetworkCalls
from search.pipeline.loading import load_pipeline
from search.teacher.batches import Teacher
from search.teacher.splits import EVALUATION_SEEDS, split_seeds


EXAMPLES = Path(__file__).parent.parent / "examples"
CPU = torch.device("cpu")


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Formulas


@pytest.mark.parametrize("count", [50, 2 * BLOCK + 7], ids=["one block", "three blocks"])
def test_the_frechet_distance_of_a_scaled_and_shifted_copy_has_a_closed_form(count):
    """The covariances commute: |shift|^2 + (1 - scale)^2 tr C."""
    x = features(count, 6)
    mean, trace = x.double().mean(0), x.double().T.cov().trace()
    expected = float((mean - (3 * mean + 0.5)).square().sum() + 4 * trace)
    # Features are float32.
    assert frechet_distance(3 * x + 0.5, x) == pytest.approx(expected, rel=1e-5)


def test_the_frechet_distance_of_fifty_thousand_is_that_of_their_mean_and_covariance():
    x, y = features(50_000, 8), features(50_000, 8, seed=1) @ features(8, 8, seed=2)
    a, b = np.cov(x.double().numpy().T), np.cov(y.double().numpy().T)
    cross = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    difference = x.double().mean(0) - y.double().mean(0)
    expected = float(difference.square().sum()) + np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def kernel(x, y):
    return (float(x @ y) / len(x) + 1) ** 3


def test_the_kernel_distance_is_its_definition_in_two_loops():
    x, y = features(9, 4).double(), features(9, 4, seed=1).double() + 0.3
    terms = [
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(y[i], x[j])
        for i in range(9)
        for j in range(9)
        if i != j
    ]
    assert kernel_distance(x.float(), y.float()) == pytest.approx(sum(terms) / (9 * 8), rel=1e-5)  # float32 features


@pytest.mark.parametrize("correlation", [0.0, 0.9], ids=["other noises", "the same noises"])
def test_the_kernel_distance_of_one_distribution_is_zero_on_average(correlation):
    values = []
    for seed in range(300):
        x, z = features(20, 3, seed=2 * seed), features(20, 3, seed=2 * seed + 1)
        values.append(kernel_distance(correlation * x + math.sqrt(1 - correlation**2) * z, x))
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


def test_the_kernel_distance_of_many_is_zero_for_a_copy_and_grows_with_what_is_added():
    x = features(2 * BLOCK + 7, 4)
    distances = [kernel_distance(x + shift, x) for shift in (0, 0.1, 0.2)]
    assert distances[0] == 0
    assert distances[0] < distances[1] < distances[2]


def test_the_kernel_distance_does_not_depend_on_how_a_longer_reference_is_sorted():
    """Blocks of a reference that is sorted by class would each be of few classes."""
    x, reference = features(500, 4), features(4000, 4, seed=1)
    ordered = reference[reference[:, 0].argsort()]
    assert kernel_distance(x, ordered) == pytest.approx(kernel_distance(x, reference), abs=0.05)
    assert abs(kernel_distance(x, ordered[:500])) > 0.2


def test_precision_and_recall_are_their_definitions_in_loops():
    x, y = features(2 * BLOCK // 25, 3), 1.3 * features(60, 3, seed=1) + 0.4

    def inside(points, others):
        radii = [sorted(float((b - a).norm()) for b in others)[3] for a in others]
        return np.mean([any((p - a).norm() <= r for a, r in zip(others, radii, strict=True)) for p in points])

    assert precision_and_recall(x, y) == pytest.approx((inside(x, y), inside(y, x)))


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (lambda two: two, (1, 1)),
        (lambda two: two + 1000, (0, 0)),
        (lambda two: two[: BLOCK + 1] + 1e-4, (1, 0.5)),
        (lambda two: torch.cat([two, two + 500]), (0.5, 1)),
    ],
    ids=["a copy", "elsewhere", "one mode of two", "two modes too many"],
)
def test_precision_falls_with_what_is_foreign_and_recall_with_what_is_missing(images, expected):
    mode = features(BLOCK + 1, 2)
    two = torch.cat([mode, mode + 100])
    assert precision_and_recall(images(two), two) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("logits", "score"),
    [(50 * torch.eye(10).repeat(4, 1), 10), (torch.zeros(7, 10), 1), (1e4 * torch.eye(10)[:1].repeat(5, 1), 1)],
    ids=["every class", "no class", "one class"],
)
def test_the_inception_score_is_the_number_of_classes_that_are_seen_for_sure(logits, score):
    assert inception_score(logits) == pytest.approx(score)


def test_the_inception_score_is_that_of_torchmetrics_which_keeps_all_logits():
    logits = 3 * features(300, 10)
    theirs = InceptionScore(nn.Identity(), splits=1)
    theirs.update(logits)
    assert inception_score(logits) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)  # theirs is in float32


def test_similarity_is_of_each_image_by_itself():
    goals = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images = (goals + torch.tensor([0.0, 0.01, 0.1]).reshape(3, 1, 1, 1) * features(3, 1, 16, 16)).clamp(0, 1)
    found = similarity(images, goals)
    expected = -10 * torch.log10((images - goals).square().mean((1, 2, 3)))
    torch.testing.assert_close(found["psnr"], expected)
    assert found["psnr"][0] == math.inf
    assert found["ssim"][0] == 1
    assert 1 > found["ssim"][1] > found["ssim"][2]


# Feature networks


class Mean(nn.Module):
    """Mean and deviation of each colour."""

    def forward(self, images):
        flat = images.flatten(2).float()
        return torch.cat([flat.mean(2), flat.std(2)], 1)


def test_a_torchscript_file_is_a_feature_network_and_sees_bytes_in_three_colours(tmp_path):
    torch.jit.script(Mean()).save(tmp_path / "mean.pt")
    network = FeatureNetwork(str(tmp_path / "mean.pt"), CPU)
    grey = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    assert network(grey)["features"].tolist() == [[0] * 6, [128] * 3 + [0] * 3, [255] * 3 + [0] * 3]
    assert "logits" not in network(grey)


NO_NUMBERS = """
import torch
class feature_network(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1) / 0.0
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be loaded: FileNotFoundError: .* Expected 'inception', 'none', a Python file"),
        ("x = 1", "cannot be loaded: AttributeError: .*feature_network"),
        (NO_NUMBERS, r"returned shapes \(2, 192\) for 2 images, or numbers that are not finite"),
        ("from torch.nn import Identity as feature_network", r"returned shapes \(2, 3, 8, 8\) for 2 images"),
        ("import torch\nfeature_network = lambda: torch.nn.Conv2d(3, 1, 3)", "failed on images of shape .*uint8"),
    ],
    ids=["no file", "no function", "no numbers", "no rows", "no bytes"],
)
def test_what_is_no_feature_network_is_refused(tmp_path, content, message):
    path = tmp_path / "network.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        FeatureNetwork(str(path), CPU)(torch.rand(2, 3, 8, 8))


def test_without_its_package_inception_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="'inception' cannot be loaded: .* needs `pip install torch-fidelity`"):
        FeatureNetwork("inception", CPU)


def test_the_digits_network_recognises_digits_it_was_not_trained_on(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from train_digits import load_images

    _, _, images, labels = load_images()
    found = FeatureNetwork(str(EXAMPLES / "digits_features.py"), CPU)((images + 1) / 2)
    assert (found["logits"].argmax(1) == labels).float().mean() > 0.98


# The measurement


TEACHER_STEPS = 40


@pytest.fixture(params=["digits-dit", "digits-sit"])
def pipe(request):
    loaded = load_pipeline(str(EXAMPLES / request.param), torch.float32, CPU)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture()
def measure(pipe, tmp_path):
    """Measures images of Adams-Bashforth tables of so many steps."""

    def measure(step_counts, **changes):
        given = {
            "num_images": 16,
            "reference": None,
            "feature_network": str(EXAMPLES / "digits_features.py"),
            **changes,
        }
        settings = ImageSettings(**given, folder=tmp_path / "out", seed=0)
        conditions = build_conditions(pipe, None, None, 2.0, {})
        network = load_feature_network(pipe, conditions[0], settings)
        process = process_from_config(pipe.scheduler.config)
        tables = {n: {"AB3": teacher_solver(process, n)} for n in step_counts}
        calls = NetworkCalls(pipe)
        found = measure_images(Teacher(pipe, TEACHER_STEPS, 4, calls), conditions, tables, network, settings)
        calls.remove()
        return found

    return measure


def test_the_teacher_is_at_no_distance_from_itself_and_more_steps_are_nearer_than_fewer(measure):
    (few, _), (more, _), (same, teacher) = (
        (row.metrics for row in rows) for rows in measure([7, 14, TEACHER_STEPS]).results.values()
    )
    assert (same["psnr"], same["ssim"], same["kid"]) == (math.inf, 1, 0)
    assert (same["precision"], same["recall"]) == (1, 1)
    # tr (C C)^(1/2) of covariances without full rank, in float64.
    assert same["fid"] == pytest.approx(0, abs=1e-5)
    assert same["inception_score"] == teacher["inception_score"]
    assert few["psnr"] < more["psnr"] and few["ssim"] < more["ssim"]
    assert few["fid"] > more["fid"] > same["fid"] and few["kid"] > abs(more["kid"])


def ordinary_images(pipe, num_steps, count, **inputs):
    """What the pipeline makes of the first noises with an Adams-Bashforth table."""
    table = teacher_solver(process_from_config(pipe.scheduler.config), num_steps)
    own, pipe.scheduler = pipe.scheduler, SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=table)
    generators = [torch.Generator().manual_seed(seed) for seed in split_seeds(0, EVALUATION_SEEDS, count)]
    inputs = {"class_labels": [k % 10 for k in range(count)], "guidance_scale": 2.0, **inputs}
    images = pipe(**inputs, generator=generators, num_inference_steps=num_steps).images
    pipe.scheduler = own
    return images


def test_images_are_those_of_ordinary_calls_of_the_pipeline(measure, pipe):
    few, many = (ordinary_images(pipe, num_steps, 8, output_type="np") for num_steps in (5, TEACHER_STEPS))
    psnr = -10 * np.log10(((few - many) ** 2).mean((1, 2, 3))).mean()
    # Networks are called with four samples here and with eight there.
    assert measure([5], num_images=8).results[5][0].metrics["psnr"] == pytest.approx(psnr, rel=1e-4)


def test_no_batch_is_kept_while_the_next_one_is_measured(measure, monkeypatch):
    alive, describe = [], image_metrics._describe

    def describe_alone(batch, *args):
        gc.collect()
        assert not any(earlier() for earlier in alive)
        alive.append(weakref.ref(batch))
        return describe(batch, *args)

    monkeypatch.setattr(image_metrics, "_describe", describe_alone)
    measure([2])
    assert len(alive) == 4


def test_images_in_a_folder_are_a_reference_for_the_teacher_too(measure, pipe, tmp_path):
    (tmp_path / "real").mkdir()
    for k, image in enumerate(ordinary_images(pipe, TEACHER_STEPS, 16)):
        image.save(tmp_path / "real" / f"{k}.png")
    found = measure([3], reference=tmp_path / "real")
    assert found.reference == str(tmp_path / "real")
    table, teacher = (row.metrics for row in found.results[3])
    # The folder has the teacher's own images, but for rounding to bytes after calls of another batch size.
    assert teacher["fid"] == pytest.approx(0, abs=1e-4)
    assert (teacher["precision"], teacher["recall"]) == (1, 1)
    assert table["fid"] > 1e-2
    assert "psnr" in table and "psnr" not in teacher
    assert not any((tmp_path / "out").iterdir())


def test_without_a_network_there_are_psnr_and_ssim(measure):
    (row,) = measure([3], feature_network="none").results[3]
    assert list(row.metrics) == ["psnr", "ssim"]
    assert "FID" not in format_metrics([row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 3}, "`--image-metrics` is 3, expected 0 or at least 8 images"),
        (
            {"reference": EXAMPLES / "results"},
            "`--reference-images` .*results has 2 images, expected at least 8",
        ),
        ({"feature_network": "other.pt"}, "The feature network 'other.pt' cannot be loaded"),
    ],
    ids=["few images", "few references", "no network"],
)
def test_what_cannot_be_measured_is_refused_before_the_search(measure, changes, message):
    with pytest.raises(ValueError, match=message):
        measure([2], **changes)


def test_a_pipeline_that_makes_videos_is_refused_before_the_search():
    settings = ImageSettings(8, "none", None, 0, Path("out"))
    with pytest.raises(ValueError, match="`--image-metrics` needs images. LTXPipeline makes none"):
        load_feature_network(build("ltx").pipe, build("ltx").inputs, settings)


def test_reference_images_of_two_sizes_are_refused(tmp_path):
    for k, size in enumerate((4, 5)):
        Image.new("RGB", (size, 6)).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match=r"1.png' has 5 x 6 pixels, '.*0.png' 4 x 6. Crop and scale"):
        image_metrics._read_images(sorted(tmp_path.iterdir()))
