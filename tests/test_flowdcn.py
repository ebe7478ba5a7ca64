"""FlowDCN: the operator and the network against the official code, and what holds for them beyond its numbers."""

import pytest
import torch
import torch.nn.functional as F
from golden_models import FIXTURES, official
from safetensors.torch import load_file

from diffusers_searched_solver.models import FlowDCNTransformer2DModel, flowdcn_transformer_2d
from diffusers_searched_solver.models.deformable_convolution import deformable_convolution
from diffusers_searched_solver.models.layers import unpatchify


def gathered(values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the operator's sum as its definition reads, over the four cells of each sample of a zero-padded map."""
    batch, rows, columns, groups, _ = values.shape
    n, g = torch.arange(batch).view(-1, 1, 1, 1, 1), torch.arange(groups).view(-1, 1)
    x = torch.arange(columns).view(-1, 1, 1) + offsets[..., 0]
    y = torch.arange(rows).view(-1, 1, 1, 1) + offsets[..., 1]
    padded = F.pad(values, (0, 0, 0, 0, 1, 1, 1, 1))
    out = torch.zeros_like(values)
    for a in (0, 1):
        for b in (0, 1):
            fy, fx = (y - y.trunc() if a else 1 - y + y.trunc()), (x - x.trunc() if b else 1 - x + x.trunc())
            i, j = (y.trunc() + a).clamp(-1, rows).long() + 1, (x.trunc() + b).clamp(-1, columns).long() + 1
            out = out + ((weights * fy * fx)[..., None] * padded[n, i, j, g]).sum(-2)
    return out


def operands(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return values, offsets and weights for two maps of three groups; a third of the samples lies outside."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, rows, columns, 3, 4), (2, rows, columns, 3, 9, 2), (2, rows, columns, 3, 9)]
    values, offsets, weights = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [values, 3 * offsets, weights]


def gradients(function, inputs: list[torch.Tensor], grad_out: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Return the output, and the gradients of the inputs."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    out.backward(torch.ones_like(out) if grad_out is None else grad_out)
    return [out.detach(), *(tensor.grad for tensor in inputs)]


def test_the_operator_and_its_gradients_are_those_of_the_official_kernels():
    golden = load_file(FIXTURES / "dcn_op.safetensors")
    found = gradients(deformable_convolution, [golden[name] for name in "vdw"], golden["grad_out"])
    for name, tensor in zip(("out", "grad_v", "grad_d", "grad_w"), found, strict=True):
        torch.testing.assert_close(tensor, golden[name], atol=1e-5, rtol=0, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (12, 7)])
def test_the_operator_is_its_definition_in_every_place_and_so_are_its_gradients(rows, columns):
    inputs = operands(rows, columns)
    for found, expected in zip(gradients(deformable_convolution, inputs), gradients(gathered, inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "x, expected",
    [(-2.25, 0.0), (-1.25, -2.5), (-0.5, 0.0), (0.5, 20.0), (1.25, 22.5), (2.0, 0.0)],
    ids=["outside", "before -1", "before 0", "inside", "last column", "behind"],
)
def test_positions_are_rounded_towards_zero(x, expected):
    values = torch.tensor([10.0, 30.0]).view(1, 1, 2, 1, 1)
    offsets = torch.tensor([x, 0.0]).expand(1, 1, 2, 1, 1, 2)
    out = deformable_convolution(values, offsets, torch.ones(1, 1, 2, 1, 1))
    # At -0.5 from columns 0 and 1, 10 * 1.5 - 30 * 0.5; rounding down would give 10 * 0.5.
    assert out[0, 0, 0].item() == expected


def test_a_position_that_is_not_a_number_spoils_its_own_output_alone():
    values, offsets, weights = operands(3, 5)
    good = deformable_convolution(values, offsets, weights)
    offsets[1, 2, 4, 0, 3, 0] = torch.nan
    bad = deformable_convolution(values, offsets, weights)
    assert bad[1, 2, 4, 0].isnan().all()
    bad[1, 2, 4, 0] = good[1, 2, 4, 0]
    assert torch.equal(bad, good)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_operator_computes_in_float32_and_rounds_once(dtype, autocast):
    values, offsets, weights = operands(3, 5, torch.float32)
    values, weights = values.to(dtype), weights.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = deformable_convolution(values, offsets, weights)
    assert torch.equal(out, deformable_convolution(values.float(), offsets, weights.float()).to(dtype))


# Offsets carry the rounding of their layers sixfold, into maps that are steep with these weights: the golden output
# itself is off from exact arithmetic by 1.4e-5, and ours in float32 off from it by 0.7e-5 to 1.3e-5, depending on the
# kernels that the CPU has.
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1.5e-5), (torch.float32, 2e-5)])
@torch.no_grad()
def test_the_network_gives_the_output_of_the_official_code(dtype, atol):
    model, golden = official("flowdcn")
    out = model.to(dtype)(golden["x"].to(dtype), golden["t"], golden["y"]).sample
    torch.testing.assert_close(out, golden["out"].to(dtype), atol=atol, rtol=0)


@torch.no_grad()
def test_a_block_gives_the_output_of_the_official_code_on_a_grid_that_is_not_square():
    model, golden = official("flowdcn")
    out = model.blocks[0](golden["block_in"], golden["block_c"][:, None, None])
    torch.testing.assert_close(out, golden["block_out"], atol=1e-5, rtol=0)


def test_patches_of_a_latent_that_is_not_square_go_back_to_their_places():
    latent = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = latent.unflatten(3, (3, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3)
    assert torch.equal(unpatchify(patches, patch_size=2), latent)


@torch.no_grad()
def test_latents_of_any_size_are_predicted_and_samples_of_a_batch_do_not_interact():
    model, golden = official("flowdcn")
    x = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    both = model(x, golden["t"], golden["y"]).sample
    assert both.shape == x.shape
    x[1], golden["t"][1], golden["y"][1] = torch.nan, 0.1, 3
    assert torch.equal(model(x, golden["t"], golden["y"]).sample[0], both[0])


@torch.no_grad()
def test_the_reach_of_a_block_can_be_set_for_each_axis():
    def output(**config) -> torch.Tensor:
        model = FlowDCNTransformer2DModel.from_config(official("flowdcn")[0].config, **config)
        model.load_state_dict(official("flowdcn")[0].state_dict())
        return predict(model)

    def predict(model) -> torch.Tensor:
        return model(golden["x"], golden["t"], golden["y"]).sample

    model, golden = official("flowdcn")
    for block in model.blocks:
        block.attn.max_scale = torch.tensor([3.0, 3.0])
    assert torch.equal(predict(model), output(max_scale=3.0))
    for block in model.blocks:
        block.attn.max_scale = torch.tensor([6.0, 3.0])
    assert not torch.allclose(predict(model), output(max_scale=3.0), atol=0.1)
    assert not torch.allclose(predict(model), output(max_scale=6.0), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@torch.no_grad()
def test_in_half_precision_positions_stay_in_float32_and_the_output_near(dtype, autocast, monkeypatch):
    model, golden = official("flowdcn")
    full, offsets = model(golden["x"], golden["t"], golden["y"]).sample, []

    def recorded(v, d, w):
        offsets.append(d)
        return deformable_convolution(v, d, w)

    monkeypatch.setattr(flowdcn_transformer_2d, "deformable_convolution", recorded)
    with torch.autocast("cpu", dtype, enabled=autocast):
        x = golden["x"] if autocast else golden["x"].to(dtype)
        half = model.to(None if autocast else dtype)(x, golden["t"], golden["y"]).sample
    assert half.dtype == dtype and {d.dtype for d in offsets} == {torch.float32}
    # The median, for where rounding carries a position over -1 or -2 the function itself jumps.
    assert (half.float() - full).abs().median() / full.square().mean().sqrt() < 5 * torch.finfo(dtype).eps


def test_gradient_checkpointing_leaves_the_gradient_as_it_is():
    def gradient(checkpointing: bool) -> torch.Tensor:
        model, golden = official("flowdcn")
        if checkpointing:
            model.enable_gradient_checkpointing()
        x = golden["x"].clone().requires_grad_()
        model.train()(x, golden["t"], golden["y"]).sample.square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(True), gradient(False), atol=1e-5, rtol=1e-6)


@torch.no_grad()
def test_a_saved_network_is_the_same_network(tmp_path):
    model, golden = official("flowdcn")
    changed = FlowDCNTransformer2DModel.from_config(model.config, max_scale=4.5)
    changed.load_state_dict(model.state_dict())
    changed.save_pretrained(tmp_path)
    loaded = FlowDCNTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.max_scale == 4.5
    inputs = golden["x"], golden["t"], golden["y"]
    assert torch.equal(loaded(*inputs, return_dict=False)[0], changed(*inputs).sample)


@pytest.mark.parametrize(
    "num_layers, num_groups, hidden_size, expected",
    [(12, 6, 384, 30_300_632), (12, 12, 768, 120_099_512), (24, 16, 1024, 421_503_952), (28, 16, 1152, 618_948_120)],
    ids=["S", "B", "L", "XL"],
)
def test_the_released_sizes_have_the_official_number_of_parameters(num_layers, num_groups, hidden_size, expected):
    with torch.device("meta"):
        model = FlowDCNTransformer2DModel(num_layers=num_layers, num_groups=num_groups, hidden_size=hidden_size)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_parameters_are_in_the_official_order_in_which_averaged_weights_are_listed():
    modules = [name.rpartition(".")[0] for name, _ in official("flowdcn")[0].named_parameters()]
    outer = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"]
    outer += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    attn = [f"attn.{name}" for name in ("v", "qk_deformables", "qk_scales", "qk_weights", "out")]
    block = ["norm1", "attn", *attn, "norm2", "mlp.w1", "mlp.w3", "mlp.w2", "adaLN_modulation.1"]
    assert list(dict.fromkeys(modules)) == outer + [f"blocks.{i}.{name}" for i in range(2) for name in block]


def test_a_new_network_predicts_zero_and_samples_on_growing_grids():
    model = FlowDCNTransformer2DModel(8, num_layers=1, num_groups=2, hidden_size=16, num_classes=10)
    x, t, y = torch.randn(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    assert model(x, t, y).sample.abs().max() == 0
    attn, golden = model.blocks[0].attn, official("flowdcn")[0].blocks[0].attn
    assert torch.equal(attn.deformables_prior, golden.deformables_prior)
    reach = 6 * attn.deformables_scale.sigmoid().flatten()
    torch.testing.assert_close(reach, torch.tensor([3.0, 6.0]), atol=1e-3, rtol=0)


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="`hidden_size` is 30, which is no multiple of `num_groups` 4"):
        FlowDCNTransformer2DModel(num_layers=1, num_groups=4, hidden_size=30)


def test_a_latent_that_patches_do_not_tile_is_refused():
    with pytest.raises(ValueError, match=r"is \(8, 7\) high and wide, expected multiples of `patch_size` 2"):
        official("flowdcn")[0](torch.zeros(1, 4, 8, 7), torch.zeros(1), torch.zeros(1, dtype=torch.long))
