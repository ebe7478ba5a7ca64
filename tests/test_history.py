"""What a run keeps of its predictions: memory of its own, no more than the table needs, and the same sums."""

import copy
import functools
import pickle
import weakref

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, tensor_step, time_grid


NUM_STEPS = 8
CONFIGS = {
    "flow": FlowMatchEulerDiscreteScheduler().config,
    "noise": DDIMScheduler().config,
    "v": DDIMScheduler(prediction_type="v_prediction").config,
}
# Orders of which sums are additions, and one that is a matrix product over all predictions.
ORDERS = [1, 2, 3, "all"]


def table(config, order, frame="velocity") -> SearchedSolver:
    process = SearchedSolverScheduler.from_config(config).process
    nodes = time_grid(process, NUM_STEPS, 0.6)
    if order != "all":
        return SearchedSolver.adams_bashforth(*nodes, frame, order)
    rng = np.random.default_rng(0)
    rows = np.tril(rng.normal(size=(NUM_STEPS, NUM_STEPS))) / NUM_STEPS + np.eye(NUM_STEPS)
    return SearchedSolver(*nodes, rows / rows.sum(1, keepdims=True), frame)


def begun(config, solver):
    scheduler = SearchedSolverScheduler.from_config(config, solver=solver)
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


def network(x, t):
    return torch.sin(2 * x + float(t) / 300)


def run(scheduler, x, network=network, begin=0):
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


def by_list(solver, prediction_type, x, begin=0):
    """The same run by [`SearchedSolver.step`] on a list of predictions, in float64."""
    x, history = x.double(), []
    for i in range(begin, solver.num_steps):
        t = torch.tensor(solver.timesteps[i], dtype=torch.float32)
        history.append(solver.prediction(network(x, t), x, i, prediction_type))
        x = solver.step(x, history, i)
    return x


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_network_that_uses_its_output_again_makes_the_same_run(kind, order):
    """As CUDA graphs and `torch.compile(mode="reduce-overhead")` do."""
    solver, x = table(CONFIGS[kind], order), torch.randn(2, 3, 5)
    output = torch.empty_like(x)
    assert torch.equal(
        run(begun(CONFIGS[kind], solver), x, lambda x, t: output.copy_(network(x, t))),
        run(begun(CONFIGS[kind], solver), x),
    )


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("order", [*ORDERS, 4, 5])
@pytest.mark.parametrize("frame", ["velocity", "data"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_is_the_run_that_the_table_says(kind, frame, order, begin):
    solver, x = table(CONFIGS[kind], order, frame), torch.randn(3, 4, dtype=torch.float64)
    scheduler = begun(CONFIGS[kind], solver)
    scheduler.set_begin_index(begin)
    expected = by_list(solver, scheduler.config.prediction_type, x, begin)
    torch.testing.assert_close(run(scheduler, x, begin=begin), expected, rtol=0, atol=1e-12 * expected.abs().max())


@pytest.mark.parametrize("order", ["all", 2])
@pytest.mark.parametrize("layout", ["channels last", "autocast", "medium precision of products"])
def test_sums_are_of_float32_whatever_layout_and_precision_networks_run_in(layout, order, request):
    solver, x = table(CONFIGS["flow"], order), torch.randn(2, 4, 6, 6)
    expected = by_list(solver, "flow_prediction", x)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "medium precision of products":
        request.addfinalizer(functools.partial(torch.set_float32_matmul_precision, "highest"))
        torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16, enabled=layout == "autocast"):
        end = run(begun(CONFIGS["flow"], solver), x)
    torch.testing.assert_close(end.double(), expected, rtol=0, atol=1e-5)
    assert end.stride() == x.stride()


def test_the_pure_function_sums_in_the_dtype_of_its_table_under_autocast():
    solver = table(CONFIGS["flow"], "all")
    x, history = torch.randn(2, 500), torch.randn(NUM_STEPS, 2, 500)
    arguments = x, x, history, torch.tensor([NUM_STEPS - 1]), solver.update_table("flow_prediction").float()
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = tensor_step(*arguments)
    assert torch.equal(result, tensor_step(*arguments)[0])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_a_run_keeps_as_many_predictions_as_its_table_needs(order):
    scheduler = begun(CONFIGS["noise"], table(CONFIGS["noise"], order))
    x = torch.randn(2, 3)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        assert len(scheduler.model_outputs) == min(i + 1, order)
        rows = {row.untyped_storage().data_ptr(): row.untyped_storage().nbytes() for row in scheduler.model_outputs}
        assert sum(rows.values()) == order * x.nbytes


class PeakOfTensors(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made meanwhile."""

    def __enter__(self):
        self.alive, self.peak = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(each) and (storage := each.untyped_storage()).data_ptr() not in self.alive:
                self.alive[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["flow", "noise"])
def test_a_run_of_order_two_needs_no_more_memory_than_unipc(kind, dtype):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if kind == "flow" else {}
    peaks = []
    for scheduler in (begun(CONFIGS[kind], table(CONFIGS[kind], 2)), UniPCMultistepScheduler(**flow)):
        scheduler.set_timesteps(NUM_STEPS)
        x = torch.randn(4, 4, 32, 32, dtype=dtype)
        with torch.no_grad(), PeakOfTensors() as memory:
            run(scheduler, x, lambda x, t: x.clone())
        peaks.append(memory.peak / x.nbytes)
    assert peaks[0] <= peaks[1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_flow_through_a_run(kind):
    solver, x = table(CONFIGS[kind], "all"), torch.randn(5, dtype=torch.float64)
    gradients = []
    for way in (
        lambda x: run(begun(CONFIGS[kind], solver), x),
        lambda x: by_list(solver, SearchedSolverScheduler.from_config(CONFIGS[kind]).config.prediction_type, x),
    ):
        leaf = x.clone().requires_grad_()
        way(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [2, "all"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_that_shrinks_mid_run_is_refused_with_both_shapes(kind, order):
    scheduler, x = begun(CONFIGS[kind], table(CONFIGS[kind], order)), torch.randn(4, 3)
    x = scheduler.step(network(x, 1), scheduler.timesteps[0], x).prev_sample[:1]
    with pytest.raises(ValueError, match=r"`sample` has shape \(1, 3\), but the run began with shape \(4, 3\)"):
        scheduler.step(network(x, 1), scheduler.timesteps[1], x)


@pytest.mark.parametrize("order", [2, "all"])
def test_frames_may_be_dropped_of_the_sample_and_of_every_prediction(order):
    """As ChronoEdit does."""
    solver, x = table(CONFIGS["flow"], order), torch.randn(4, 3)
    whole, dropping = begun(CONFIGS["flow"], solver), begun(CONFIGS["flow"], solver)
    y = x
    for i, t in enumerate(whole.timesteps):
        x = whole.step(network(x, t), t, x).prev_sample
        if i == 3:
            y = y[[0, -1]]
            for j in range(len(dropping.model_outputs)):
                dropping.model_outputs[j] = dropping.model_outputs[j][[0, -1]]
        y = dropping.step(network(y, t), t, y).prev_sample
    torch.testing.assert_close(y, x[[0, -1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [2, "all"])
def test_copies_that_are_made_mid_run_go_on_by_themselves(order):
    scheduler, x = begun(CONFIGS["noise"], table(CONFIGS["noise"], order)), torch.randn(4, 3)
    for t in scheduler.timesteps[:5]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    copies = copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))
    ends = [run(each, x, begin=5) for each in (scheduler, *copies)]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_states_may_become_more_precise_mid_run():
    solver = table(CONFIGS["flow"], "all")
    scheduler, x = begun(CONFIGS["flow"], solver), torch.randn(4, 3)
    expected = by_list(solver, "flow_prediction", x)
    for i, t in enumerate(scheduler.timesteps):
        x = x.double() if i == 4 else x
        x = scheduler.step(network(x, t), t, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
