"""SiT and DiT: the network against the official code."""

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from golden_models import official

from diffusers_searched_solver.models import SiTTransformer2DModel
from diffusers_searched_solver.models.layers import TimeEmbedder


# The golden outputs are float32 numbers up to 5.3, by up to 1.4e-6 off from the same weights in exact arithmetic.
ATOL = {torch.float64: 1.5e-6, torch.float32: 3e-6}


def golden_frequencies() -> torch.Tensor:
    """Return the official frequencies as they were rounded where the fixtures were made.

    exp of the float32 exponents is nearly half-way between two floats at k = 12 and 13, where builds of exp differ;
    at t = 999 the last bit of one frequency turns its wave by 3e-5 and the outputs by 7e-6.
    """
    exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
    frequencies = exponents.double().exp().float()
    frequencies[13] = frequencies[13].nextafter(torch.tensor(1.0))
    return frequencies


def test_frequencies_are_the_official_ones_to_their_last_bit():
    ours = TimeEmbedder(8).frequencies(torch.device("cpu"))
    assert (ours / golden_frequencies() - 1).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("name", ["sit", "dit"])
@torch.no_grad()
def test_the_official_code_gives_the_same_output(name, dtype, monkeypatch):
    monkeypatch.setattr(TimeEmbedder, "frequencies", lambda *_: golden_frequencies())
    model, golden = official(name)
    out = model.to(dtype)(golden["x"].to(dtype), golden["t"], golden["y"]).sample
    torch.testing.assert_close(out, golden["out"].to(dtype), atol=ATOL[dtype], rtol=0)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("name", ["sit", "dit"])
@torch.no_grad()
def test_the_official_code_gives_the_same_guided_output(name, dtype, monkeypatch):
    monkeypatch.setattr(TimeEmbedder, "frequencies", lambda *_: golden_frequencies())
    model, golden = official(name)
    out = model.to(dtype)(golden["cfg_x"].to(dtype), golden["cfg_t"], golden["cfg_y"]).sample
    out, null = out.chunk(2)
    out[:, :3] = 4 * out[:, :3] - 3 * null[:, :3]
    torch.testing.assert_close(out, golden["cfg_out"][: len(out)].to(dtype), atol=7 * ATOL[dtype], rtol=0)


@torch.no_grad()
def test_the_stock_dit_with_the_official_frequencies_is_the_same_function():
    ours, golden = official("dit")
    stock = DiTTransformer2DModel(4, 8, 4, 8, 2, sample_size=8, num_embeds_ada_norm=10, norm_eps=1e-6).eval()
    w, state = ours.state_dict(), {}
    for kind in ("weight", "bias"):
        state[f"pos_embed.proj.{kind}"] = w[f"x_embedder.proj.{kind}"]
        state[f"proj_out_1.{kind}"] = w[f"final_layer.adaLN_modulation.1.{kind}"]
        state[f"proj_out_2.{kind}"] = w[f"final_layer.linear.{kind}"]
        for i in range(2):
            theirs, mine = f"transformer_blocks.{i}", f"blocks.{i}"
            state[f"{theirs}.norm1.emb.timestep_embedder.linear_1.{kind}"] = w[f"t_embedder.mlp.0.{kind}"]
            state[f"{theirs}.norm1.emb.timestep_embedder.linear_2.{kind}"] = w[f"t_embedder.mlp.2.{kind}"]
            state[f"{theirs}.norm1.linear.{kind}"] = w[f"{mine}.adaLN_modulation.1.{kind}"]
            qkv = w[f"{mine}.attn.qkv.{kind}"].chunk(3)
            state |= {f"{theirs}.attn1.to_{n}.{kind}": part for n, part in zip("qkv", qkv, strict=True)}
            state[f"{theirs}.attn1.to_out.0.{kind}"] = w[f"{mine}.attn.proj.{kind}"]
            state[f"{theirs}.ff.net.0.proj.{kind}"] = w[f"{mine}.mlp.fc1.{kind}"]
            state[f"{theirs}.ff.net.2.{kind}"] = w[f"{mine}.mlp.fc2.{kind}"]
    for i, block in enumerate(stock.transformer_blocks):
        table = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        state[table] = w["y_embedder.embedding_table.weight"]
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    stock.load_state_dict(state)
    x, out = golden["x"].double(), ours.double()(golden["x"].double(), golden["t"], golden["y"]).sample
    torch.testing.assert_close(stock.double()(x, golden["t"], golden["y"]).sample, out, atol=1e-12, rtol=0)


def test_the_released_size_has_the_official_number_of_parameters():
    with torch.device("meta"):
        model = SiTTransformer2DModel()
    assert sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() == 675_129_632


def test_a_new_network_predicts_zero():
    model = SiTTransformer2DModel(8, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=10)
    assert model(torch.randn(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)).sample.abs().max() == 0


def test_gradient_checkpointing_leaves_the_gradient_as_it_is():
    def gradient(checkpointing: bool) -> torch.Tensor:
        model, golden = official("sit")
        if checkpointing:
            model.enable_gradient_checkpointing()
        x = golden["x"].clone().requires_grad_()
        model.train()(x, golden["t"], golden["y"]).sample.square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(True), gradient(False), atol=1e-5, rtol=1e-6)


@torch.no_grad()
def test_half_precision_weights_run_with_the_time_in_float32():
    model, golden = official("sit")
    full = model(golden["x"], golden["t"], golden["y"]).sample
    half = model.to(torch.bfloat16)(golden["x"].to(torch.bfloat16), golden["t"], golden["y"]).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).square().mean() / full.square().mean() < 2e-3  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sample_size": 9}, "`sample_size` is 9"),
        ({"num_attention_heads": 3, "attention_head_dim": 2}, "is 6, which is no multiple of 4"),
        ({"prediction_type": "v_prediction"}, "`prediction_type` is 'v_prediction'"),
    ],
    ids=["size", "width", "prediction type"],
)
def test_a_network_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SiTTransformer2DModel(**{"sample_size": 8, "num_layers": 1} | arguments)


def test_a_latent_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"is \(8, 12\) high and wide, expected \(8, 8\)"):
        official("sit")[0](torch.zeros(1, 4, 8, 12), torch.zeros(1), torch.zeros(1, dtype=torch.long))
