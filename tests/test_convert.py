"""Conversion: every layout gives the official network, and what is not whole is refused."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from diffusers_searched_solver.convert import convert, main
from diffusers_searched_solver.models import SiTTransformer2DModel
from diffusers_searched_solver.pipelines import ClassToImagePipeline
from search.pipeline.loading import CHECKPOINTS, HUB_NAMES, load_pipeline


FIXTURES = Path(__file__).parent / "fixtures"
# The official order of declaration, which is that of an EMA list without names.
OUTER = """x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 y_embedder.embedding_table final_layer.linear
    final_layer.adaLN_modulation.1""".split()
BLOCK = """norm1 attn.deformables_prior attn.deformables_scale attn.v attn.qk_deformables attn.qk_scales
    attn.qk_weights attn.out norm2 mlp.w1 mlp.w3 mlp.w2 adaLN_modulation.1""".split()


def golden(model: str) -> tuple[dict, dict]:
    """Return the official weights of a fixture, and its inputs and outputs."""
    tensors = load_file(FIXTURES / f"{model}_tiny.safetensors")
    return {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}, tensors


def garbage(weights: dict) -> dict:
    return {name: torch.randn_like(value) for name, value in weights.items()}


def in_official_order(weights: dict) -> list:
    modules = [*OUTER, *(f"blocks.{i}.{name}" for i in range(2) for name in BLOCK)]
    names = [name for module in modules for name in (module, f"{module}.weight", f"{module}.bias")]
    ordered = [weights[name] for name in names if name in weights]
    assert len(ordered) == len(weights)
    return ordered


def training_checkpoint(weights: dict) -> dict:
    args = argparse.Namespace(model="SiT-XL/2")
    return {"model": garbage(weights), "ema": weights, "opt": {"state": {}}, "args": args}


def lightning_checkpoint(weights: dict) -> dict:
    state_dict = {f"denoiser.{name}": value for name, value in garbage(weights).items()}
    optimizer = {"opt": {"state": {}}, "ema": tuple(in_official_order(weights)), "decay": 0.9999}
    return {"epoch": 3, "state_dict": state_dict, "optimizer_states": [optimizer], "callbacks": {}}


def prefixed_checkpoint(weights: dict) -> dict:
    state_dict = {f"denoiser.{name}": value for name, value in garbage(weights).items()}
    return {"state_dict": state_dict | {f"ema_denoiser.{name}": value for name, value in weights.items()}}


def save(content, tmp_path: Path, name: str = "checkpoint.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def convert_tiny(model: str, checkpoint: Path, output: Path, **kwargs) -> ClassToImagePipeline:
    kwargs = {"vae": None, "labels": None} | kwargs
    kwargs |= {"sample_size": 8} if model == "flowdcn" else {"num_heads": 4}
    convert(model, checkpoint, output, **kwargs)
    return ClassToImagePipeline.from_pretrained(output)


LAYOUTS = [
    ("sit", dict),
    ("sit", training_checkpoint),
    ("dit", dict),
    ("dit", training_checkpoint),
    ("flowdcn", dict),
    ("flowdcn", lightning_checkpoint),
    ("flowdcn", prefixed_checkpoint),
    ("flowdcn", lambda weights: {"state_dict": {f"denoiser.{name}": value for name, value in weights.items()}}),
]


@pytest.mark.parametrize("model, layout", LAYOUTS, ids=lambda value: getattr(value, "__name__", value))
@torch.no_grad()
def test_every_official_layout_gives_the_official_outputs(model, layout, tmp_path):
    weights, numbers = golden(model)
    pipe = convert_tiny(model, save(layout(weights), tmp_path), tmp_path / "out")
    out = pipe.transformer(numbers["x"], numbers["t"], numbers["y"]).sample
    # What the networks themselves are held to, whose weights these are to the bit.
    torch.testing.assert_close(out, numbers["out"], atol=1e-5, rtol=0)
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, weights[name]), name


def official_dit_of_diffusers() -> DiTTransformer2DModel:
    """Return diffusers' class as the official function: its frequencies, and one embedder for all blocks."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(4, 8, 4, 8, 2, sample_size=8, num_embeds_ada_norm=10, norm_eps=1e-6).eval()
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


@pytest.mark.parametrize(
    "options, path",
    [
        ({}, "dit/transformer"),
        ({}, "dit"),
        ({}, "dit/transformer/diffusion_pytorch_model.safetensors"),
        ({"max_shard_size": "100KB"}, "dit/transformer"),
        ({"safe_serialization": False}, "dit/transformer"),
    ],
    ids=["folder", "pipeline folder", "file", "shards", "bin"],
)
@torch.no_grad()
def test_a_dit_in_the_layout_of_diffusers_gives_the_same_outputs(options, path, tmp_path):
    theirs = official_dit_of_diffusers()
    theirs.save_pretrained(tmp_path / "dit" / "transformer", **options)
    convert("dit", tmp_path / path, tmp_path / "out", vae=None, labels=None)
    ours = ClassToImagePipeline.from_pretrained(tmp_path / "out").transformer
    _, numbers = golden("dit")
    inputs = numbers["x"], numbers["t"], numbers["y"]
    # The same sums in another order; two such networks of outputs around 1 differ by 1e-6.
    torch.testing.assert_close(ours(*inputs).sample, theirs(*inputs).sample, atol=5e-6, rtol=0)


def test_embedders_that_differ_between_blocks_are_refused(tmp_path):
    model = official_dit_of_diffusers()
    model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias.data += 1e-3
    model.save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"blocks.1.norm1.emb.timestep_embedder.linear_2.bias` is not equal"):
        convert_tiny("dit", tmp_path / "dit", tmp_path / "out")


def test_a_dit_of_diffusers_is_not_taken_for_a_sit(tmp_path):
    official_dit_of_diffusers().save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match="Missing: blocks.0.mlp.fc1.bias, .* Check `--model`"):
        convert_tiny("sit", tmp_path / "dit", tmp_path / "out")


def spoil_config(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"activation_fn": "geglu"}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "There is no '.*config.json', which says the number of"),
        (spoil_config, "`activation_fn` 'geglu', that of DiT is 'gelu-approximate'"),
        (
            lambda folder: save_file({"proj_out_1.bias": torch.ones(2)}, folder / "x.safetensors"),
            "x.safetensors' has `proj_out_1.bias`, which a file beside it has too",
        ),
        (
            lambda folder: save_file({"transformer_blocks.0.norm3.bias": torch.ones(2)}, folder / "x.safetensors"),
            "Left over: transformer_blocks.0.norm3.bias.",
        ),
    ],
    ids=["no config", "activation", "twice", "left over"],
)
def test_a_folder_that_is_not_a_dit_of_diffusers_is_refused(spoil, message, tmp_path):
    official_dit_of_diffusers().save_pretrained(tmp_path / "dit")
    spoil(tmp_path / "dit")
    with pytest.raises(ValueError, match=message):
        convert_tiny("dit", tmp_path / "dit", tmp_path / "out")


@pytest.mark.parametrize(
    "model, scheduler, guidance_channels",
    [
        ("sit", FlowMatchEulerDiscreteScheduler, 3),
        ("dit", DDIMScheduler, 3),
        ("flowdcn", FlowMatchEulerDiscreteScheduler, None),
    ],
    ids=["sit", "dit", "flowdcn"],
)
def test_the_folder_is_a_whole_pipeline(model, scheduler, guidance_channels, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(3, 3, block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "labels.json").write_text(json.dumps({str(i): f"class {i}, c{i}" for i in range(10)}))
    checkpoint = save(golden(model)[0], tmp_path)
    pipe = convert_tiny(
        model, checkpoint, tmp_path / "out", vae=str(tmp_path / "vae"), labels=str(tmp_path / "labels.json")
    )
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is scheduler
    assert pipe.config.guidance_channels == guidance_channels
    assert pipe.transformer.config.num_classes == 10
    images = [
        pipe(label, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for label in ("class 3", "c3", 3)
    ]
    assert images[0].shape == (1, 8, 8, 3)
    assert (images[0] == images[2]).all() and (images[1] == images[2]).all()


def test_labels_come_from_another_pipeline(tmp_path):
    index = {"_class_name": "DiTPipeline", "id2label": {"0": "tench", "1": "goldfish"}}
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "model_index.json").write_text(json.dumps(index))
    checkpoint = save(golden("sit")[0], tmp_path)
    pipe = convert_tiny("sit", checkpoint, tmp_path / "out", labels=str(tmp_path / "dit"))
    assert pipe.labels == {"goldfish": 1, "tench": 0}


@pytest.mark.parametrize("width, heads", [(1152, 16), (768, 12), (384, 6)], ids=["XL", "B", "S"])
def test_the_heads_of_published_sizes_are_known(width, heads, tmp_path):
    model = SiTTransformer2DModel(8, num_layers=1, attention_head_dim=width // 16, num_classes=1, learn_sigma=False)
    convert("sit", save(model.state_dict(), tmp_path), tmp_path / "out", vae=None, labels=None)
    config = ClassToImagePipeline.from_pretrained(tmp_path / "out").transformer.config
    assert (config.num_attention_heads, config.attention_head_dim) == (heads, width // heads)
    assert (config.sample_size, config.num_classes, config.learn_sigma) == (8, 1, False)


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def replaced(name, change):
    return lambda weights: weights | {name: change(weights[name])}


DAMAGES = [
    (without("blocks.1.mlp.fc2.bias"), "Missing: blocks.1.mlp.fc2.bias."),
    (without("x_embedder.proj.weight"), "Missing: x_embedder.proj.weight."),
    (lambda weights: weights | {"rope": torch.ones(2), "head.bias": torch.ones(2)}, "Left over: head.bias, rope."),
    (lambda weights: {f"module.{k}": v for k, v in weights.items()}, "Missing: blocks.0.mlp.fc1.bias, final_layer"),
    (replaced("blocks.0.attn.proj.bias", lambda w: w[:8]), r"`blocks.0.attn.proj.bias` \(8,\) \(\(32,\)\)"),
    (replaced("t_embedder.mlp.0.bias", lambda w: w / 0), "`t_embedder.mlp.0.bias` has values that are not finite"),
    (replaced("t_embedder.mlp.0.bias", lambda w: w.long()), "`t_embedder.mlp.0.bias` has values that are not"),
    (replaced("pos_embed", lambda w: w + 2e-5), "`pos_embed` differs by 2.0e-05 from the table"),
    (lambda weights: {"model": weights, "steps": 3}, "has 'model', 'steps' where weights were expected"),
    (lambda weights: list(weights.values()), "has 'list' where weights were expected"),
    (lambda weights: {"optimizer_states": [{"ema": list(weights.values())}]}, "EMA list of the checkpoint has 32"),
]
NAMES = "missing missing-outer extra prefix shape nan integer positions nested list ema-list".split()


@pytest.mark.parametrize("damage, message", DAMAGES, ids=NAMES)
def test_a_checkpoint_that_is_not_the_official_network_is_refused(damage, message, tmp_path):
    checkpoint = save(damage(golden("sit")[0]), tmp_path)
    with pytest.raises(ValueError, match=message):
        convert_tiny("sit", checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_positions_in_the_rounding_of_another_library_are_kept_as_they_are(tmp_path):
    weights, _ = golden("sit")
    weights["pos_embed"] += 5e-6
    pipe = convert_tiny("sit", save(weights, tmp_path), tmp_path / "out")
    assert torch.equal(pipe.transformer.pos_embed, weights["pos_embed"])


class Payload:
    """What a hostile file would hold: unpickling it calls a function."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_pickled_object_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save(golden("sit")[0] | {"payload": Payload()}, tmp_path)
    with pytest.raises(ValueError, match=r"Python objects \(.*getattr.*\), and only tensors are read"):
        convert_tiny("sit", checkpoint, tmp_path / "out")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.safetensors"])
@pytest.mark.parametrize("content", ["half", "a web page"])
def test_a_broken_download_is_refused(name, content, tmp_path):
    path, (weights, _) = tmp_path / name, golden("sit")
    save_file(weights, path) if name.endswith("safetensors") else torch.save(weights, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else b"<html>Sign in</html>")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint.* Is the download complete"):
        convert_tiny("sit", path, tmp_path / "out")


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("sit", {}, "32 wide and has an unknown number of heads.*`--num-heads` with a divisor of 32"),
        ("sit", {"num_heads": 5}, "32 wide and has 5 heads"),
        ("sit", {"num_heads": 4, "sample_size": 8}, "`sample_size` is 8, but the checkpoint says that of sit"),
        ("SiT", {"num_heads": 4}, "`model` is 'SiT'. Pass one of 'sit', 'dit', 'flowdcn'"),
        ("flowdcn", {"num_heads": 4}, "`num_heads` is 4, but FlowDCN has no attention"),
        ("sit", {"num_heads": 4, "checkpoint": "nowhere.pt"}, "There is no checkpoint '.*nowhere.pt'"),
        ("sit", {"num_heads": 4, "vae": "empty"}, "There is no autoencoder 'empty'"),
        ("sit", {"num_heads": 4, "vae": "vae"}, "latents of 3 channels, the network 4"),
        ("sit", {"num_heads": 4, "labels": "labels.json"}, "name 12 classes, 11 among them, but the network has 10"),
        ("sit", {"num_heads": 4, "labels": "checkpoint.pt"}, "There are no labels 'checkpoint.pt'"),
        ("sit", {"num_heads": 4, "labels": "vae"}, "There are no labels 'vae'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_bad_argument_is_refused_with_what_to_pass_instead(model, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    AutoencoderKL(3, 3, block_out_channels=(8,), norm_num_groups=4, latent_channels=3).save_pretrained("vae")
    Path("labels.json").write_text(json.dumps({str(i): f"class {i}" for i in range(12)}))
    save(golden("sit")[0], tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(model, **{"checkpoint": "checkpoint.pt", "output": "out", "vae": None, "labels": None} | options)
    assert not Path("out").exists()


def test_an_output_folder_with_something_in_it_is_refused_and_an_empty_one_is_used(tmp_path):
    checkpoint = save(golden("sit")[0], tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="The output '.*out' exists. Remove it, or name another folder"):
        convert_tiny("sit", checkpoint, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").unlink()
    convert_tiny("sit", checkpoint, tmp_path / "out")


def test_a_failure_after_the_weights_are_written_leaves_nothing(tmp_path):
    checkpoint = save(golden("sit")[0], tmp_path)
    vae = AutoencoderKL(3, 3, block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    vae.save_config(tmp_path / "vae")  # without weights, which the last step of the conversion looks for
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        convert_tiny("sit", checkpoint, tmp_path / "out", vae=str(tmp_path / "vae"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "vae"]


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: There is no checkpoint"):
        main(["--model", "sit", "--checkpoint", str(tmp_path / "no.pt"), "--output", str(tmp_path / "out")])


MEASURE = """
import resource, sys
from diffusers_searched_solver.convert import convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
convert("sit", sys.argv[1], sys.argv[2], vae=None, labels=None)
print(peak() - before)
"""


def test_the_weights_are_in_memory_once(tmp_path):
    checkpoint = save(SiTTransformer2DModel(num_layers=2).state_dict(), tmp_path)
    command = [sys.executable, "-c", MEASURE, str(checkpoint), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    assert grown < 1.3 * checkpoint.stat().st_size  # twice, if anything held a copy


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_commands_in_the_error_for_a_name_make_the_pipeline_of_that_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"'{name}' has to be converted first") as raised:
        load_pipeline(name, torch.float32, torch.device("cpu"))
    download, conversion = [shlex.split(line) for line in str(raised.value).splitlines()[1:]]
    assert download[:2] == ["hf", "download"] and download[-2:] == ["--local-dir", "."]
    assert conversion[:3] == ["python", "-m", "diffusers_searched_solver.convert"]

    model = conversion[conversion.index("--model") + 1]
    save(golden(model)[0], tmp_path, name=download[3])
    main([*conversion[3:], "--vae", "none", "--labels", "none", *([] if model == "flowdcn" else ["--num-heads", "4"])])
    pipe = load_pipeline(name, torch.bfloat16, torch.device("cpu"))
    assert isinstance(pipe, ClassToImagePipeline)
    if model == "flowdcn":
        assert pipe.transformer.config.sample_size == int(name.split("-")[-1]) / 8
    assert pipe.transformer.dtype == torch.bfloat16


def test_the_readme_has_the_commands_of_the_error():
    with pytest.raises(ValueError) as raised:
        load_pipeline("SiT-XL-2-256", torch.float32, torch.device("cpu"))
    readme = (Path(__file__).parent.parent / "search" / "README.md").read_text()
    for command in str(raised.value).splitlines()[1:]:
        assert command.strip() in readme.splitlines()


def test_a_folder_goes_before_the_hub_repository_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = next(iter(HUB_NAMES))
    convert_tiny("dit", save(golden("dit")[0], tmp_path), tmp_path / name)
    pipe = load_pipeline(name, torch.float32, torch.device("cpu"))
    assert pipe.transformer.config.prediction_type == "epsilon"
