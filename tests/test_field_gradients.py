"""Gradients of predictions with respect to state and time, through whole pipelines."""

import gc
import weakref

import pytest
import torch
from fields import ALL, DIGITS, inputs_of, load, seeds_of, start_of
from tiny_pipelines import build

from search.pipeline.field import FieldError


NO_GRADIENT = {"x": ("modular_flux",), "timestep": ("modular_flux", "hunyuan_dit", "aura_flow", "cosmos25")}
KEEPS_OLD_STATES = ("ltx_image_to_video", "ltx_condition_on_an_image")


pytestmark = pytest.mark.usefixtures("one_thread")


# Gradients


def test_predictions_have_a_graph_only_if_an_input_requires_a_gradient(digits_dit, open_field):
    field = open_field(digits_dit, DIGITS, [0, 1])
    assert any(parameter.requires_grad for parameter in digits_dit.transformer.parameters())
    plain = field(field.noise, 500.0)
    with_graph = field(field.noise.clone().requires_grad_(), 500.0)
    with torch.no_grad():
        without = field(field.noise.clone().requires_grad_(), torch.tensor(500.0, requires_grad=True))
    assert [each.requires_grad for each in (plain, with_graph, without, field(field.noise, 500.0))] == [0, 1, 0, 0]
    assert torch.equal(plain, with_graph)
    assert torch.equal(plain, without)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("source", ["x", "timestep"])
def test_a_pipeline_gives_gradients_or_says_that_it_does_not(name, source, open_field):
    inputs = inputs_of(name)
    field = open_field(build(name).pipe, inputs, seeds_of(inputs), start_of(name))
    arguments = {"x": field.noise / 2, "timestep": torch.tensor(450.0)}
    arguments[source].requires_grad_()
    if name in NO_GRADIENT[source]:
        with pytest.raises(FieldError, match=f"hands on no gradient with respect to `{source}`"):
            field(**arguments)
        return
    prediction = field(**arguments)
    assert torch.equal(prediction, field(field.noise / 2, 450.0))
    (gradient,) = torch.autograd.grad(prediction.square().sum(), arguments[source])
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("example", ["digits-dit", "digits-sit", "sd15", "sd3", "flux", "wan"])
def test_gradients_are_the_derivatives(example, open_field):
    """Against central differences, which the rounding of float32 leaves with three digits."""
    pipe, inputs = (load(example), DIGITS) if example in ("digits-dit", "digits-sit") else (build(example).pipe, None)
    inputs = inputs or inputs_of(example)
    field = open_field(pipe, inputs, seeds_of(inputs))
    generator = torch.Generator().manual_seed(0)
    weights, direction = (torch.randn(field.noise.shape, generator=generator) for _ in range(2))
    x, timestep = field.noise / 2, torch.tensor(450.0)

    def projected(x, timestep):
        return (field(x, timestep).double() * weights).sum()

    value = projected(x.requires_grad_(), timestep.requires_grad_())
    by_x, by_time = torch.autograd.grad(value, (x, timestep))
    with torch.no_grad():
        along = (projected(x + 1e-2 * direction, 450.0) - projected(x - 1e-2 * direction, 450.0)) / 2e-2
        later = (projected(x, 450.125) - projected(x, 449.875)) / 0.25
    scale = by_x.norm().item()
    torch.testing.assert_close((by_x * direction).sum().double(), along, rtol=1e-2, atol=1e-3 * scale)
    torch.testing.assert_close(by_time.double(), later, rtol=3e-2, atol=1e-3 * scale / 100)


def test_gradients_of_a_run_reach_all_of_its_times_and_come_again(digits_dit, open_field):
    field = open_field(digits_dit, DIGITS, [0, 1])

    def gradient():
        times = torch.tensor([900.0, 600.0, 300.0], dtype=torch.float64, requires_grad=True)
        x = field.noise
        for timestep in times:
            x = x - 0.3 * field(x, timestep)
        x.square().mean().backward()
        return times.grad

    first = gradient()
    assert (first != 0).all()
    assert torch.equal(gradient(), first)


@pytest.mark.parametrize("name", KEEPS_OLD_STATES)
def test_a_pipeline_that_keeps_a_part_of_old_states_gives_gradients_again_once_it_is_closed(name, open_field):
    field = open_field(build(name).pipe, inputs_of(name), [0])
    noise = field.noise

    def gradient():
        x = noise.clone().requires_grad_()
        field(x - 0.1 * field(x, 900.0), 500.0).square().sum().backward()
        return x.grad

    first = gradient()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradient()
    field.close()
    assert torch.equal(gradient(), first)


def test_no_activation_outlives_the_backward_pass(digits_dit, open_field):
    """The suspended call still holds the last prediction, but not what its gradient needed."""
    field, activations = open_field(digits_dit, DIGITS, [0, 1]), []
    linear = digits_dit.transformer.transformer_blocks[0].ff.net[-1]
    handle = linear.register_forward_pre_hook(lambda module, args: activations.append(weakref.ref(args[0])))
    x = field.noise.clone().requires_grad_()
    prediction = field(x, 500.0)
    handle.remove()
    assert activations[-1]() is not None
    prediction.square().sum().backward()
    gc.collect()
    assert activations[-1]() is None


def test_gradient_checkpointing_gives_the_same_gradients_from_less_memory(open_field):
    pipe = load("digits-dit")
    gradients, kept = [], []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for checkpointing in (False, True):
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        field = open_field(pipe, DIGITS, [0, 1])
        kept.append(0)
        inputs = field.noise.clone().requires_grad_(), torch.tensor(500.0, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prediction = field(*inputs)
        gradients.append(torch.autograd.grad(prediction.square().sum(), inputs))
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
    assert kept[1] < 0.5 * kept[0]
