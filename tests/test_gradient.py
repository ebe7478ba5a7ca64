"""The paper's recipe: its loss and updates against the recipe written out in numpy, then on the shipped pipelines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fields import load
from tiny_pipelines import build

from diffusers_searched_solver import FlowMatching, SearchedSolver, VariancePreserving, time_grid
from search.gradient.consistent_family import ConsistentFamily
from search.gradient.differentiable_network import DifferentiableNetwork
from search.gradient.recipe import Recipe, fit_by_gradient, loss_and_gradient, recipe_teacher
from search.pipeline.field import FieldError, NetworkCalls
from search.pipeline.rollout import endpoint_errors
from search.teacher.batches import Teacher


ROOT = Path(__file__).parent.parent
PROCESSES = {"flow matching": FlowMatching(), "variance preserving": VariancePreserving()}
NUM_STEPS = {"second order at the end": 6, "all coefficients": 7}
TEACHER_STEPS = 100

pytestmark = pytest.mark.usefixtures("one_thread")


# The recipe written out, around networks in closed form


def prediction(process, x, timestep, sin):
    """Noise minus data on flow matching, noise on variance-preserving processes; of arrays or tensors."""
    t = timestep / 1000
    return sin(2 * x + 3 * t) * (0.5 + t) if process.kind == "flow_matching" else t * x + 0.2 * sin(2 * x + 3 * t)


class ClosedFormField:
    def __init__(self, process, noise):
        self.process, self.noise, self.seeds = process, torch.from_numpy(noise), range(len(noise))
        self.prediction_type = "flow_prediction" if process.kind == "flow_matching" else "epsilon"

    def evaluate(self, x, timestep, node=None):
        return prediction(self.process, x, timestep, torch.sin), x


class ClosedFormNetwork:
    """In float64, two samples to a call."""

    def __init__(self, process):
        self.process = process

    def split(self, numbers):
        return [numbers[k : k + 2] for k in range(0, len(numbers), 2)]

    def map(self, function, samples):
        return [function(ClosedFormField(self.process, noise(samples)))]


def noise(numbers):
    return np.stack([np.random.default_rng(number).standard_normal(5) for number in numbers])


def run_by_the_paper(process, x, timesteps, coefficients):
    """
    The states of a run.

    Flow matching: t = 1 - timestep / 1000 grows to 1 along v = data - noise. Variance preserving: x0 is the data,
    omega = alpha / sigma, x' = sigma' / sigma * x + sigma' * (omega' - omega) * sum c x0, and at last x' = sum c x0.
    """
    states, history = [x], []
    for i, (timestep, row) in enumerate(zip(timesteps, coefficients, strict=True)):
        last = i + 1 == len(timesteps)
        output = prediction(process, x, timestep, np.sin)
        if process.kind == "flow_matching":
            history.append(-output)
            length = (timestep - (0 if last else timesteps[i + 1])) / 1000
            x = x + length * sum(c * v for c, v in zip(row, history, strict=False))
        else:
            alpha, sigma = process.alpha_sigma(timestep)
            history.append((x - sigma * output) / alpha)
            combined = sum(c * data for c, data in zip(row, history, strict=False))
            if last:
                x = combined
            else:
                next_alpha, next_sigma = process.alpha_sigma(timesteps[i + 1])
                x = next_sigma / sigma * x + next_sigma * (next_alpha / next_sigma - alpha / sigma) * combined
        states.append(x)
    return states


class PaperLoss:
    """The loss as a function of (r, free coefficients row by row), and its gradient by central differences."""

    def __init__(self, process, num_steps, numbers):
        self.process, self.num_steps, self.noise = process, num_steps, noise(numbers)
        flow = process.kind == "flow_matching"
        self.grid = 1000 * (1 - np.arange(101) / 100) if flow else np.linspace(999, 0, 100)
        timesteps = self.grid[:100]
        self.teacher = run_by_the_paper(process, self.noise, timesteps, np.eye(100))

    def tables(self, vector):
        n = self.num_steps
        shares = np.exp(vector[:n]) / np.exp(vector[:n]).sum()
        timesteps = (1000 if self.process.kind == "flow_matching" else 999) * (1 - np.cumsum(shares) + shares)
        coefficients, rest = np.eye(n), iter(vector[n:])
        for i in range(n):
            for j in range(i):
                if n > 6 or i < n - 2 or j == i - 1:
                    coefficients[i, j] = next(rest)
                    coefficients[i, i] -= coefficients[i, j]
        assert next(rest, None) is None
        return timesteps, coefficients

    def __call__(self, vector):
        timesteps, coefficients = self.tables(vector)
        states = run_by_the_paper(self.process, self.noise, timesteps, coefficients)
        loss = 0
        for state, timestep in zip(states[1:-1], timesteps[1:], strict=True):
            k = np.flatnonzero(self.grid >= timestep)[-1]
            weight = (self.grid[k] - timestep) / (self.grid[k] - self.grid[k + 1])
            target = (1 - weight) * self.teacher[k] + weight * self.teacher[k + 1]
            loss += ((state - target) ** 2).mean()
        distance = abs(states[-1] - self.teacher[-1])
        huber = np.where(distance < 0.001, distance**2 / 2, 0.001 * (distance - 0.001 / 2))
        return loss + (distance**2).mean() + 1000 * huber.mean()

    def gradient(self, vector, change=1e-6):
        steps = change * np.eye(len(vector))
        return np.array([(self(vector + step) - self(vector - step)) / (2 * change) for step in steps])


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


@pytest.fixture(params=NUM_STEPS)
def num_steps(request):
    return NUM_STEPS[request.param]


def some_vector(family):
    start = family.start()
    return start + 0.3 * torch.sin(torch.arange(len(start), dtype=torch.float64))


def test_loss_and_gradient_are_those_of_the_recipe(process, num_steps):
    family = ConsistentFamily(process, num_steps)
    vector = some_vector(family)
    paper = PaperLoss(process, num_steps, range(4))
    loss, *gradient = loss_and_gradient(ClosedFormNetwork(process), family, vector, range(4), TEACHER_STEPS)
    assert loss == pytest.approx(paper(vector.numpy()), rel=1e-10)
    expected = paper.gradient(vector.numpy())
    # Central differences of a loss near 1 round to 1e-10 and are off by the square of the change, 1e-12.
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
    assert (abs(expected) > 1e-5).all()


def test_the_first_updates_are_those_of_lion_on_the_recipe(process, num_steps):
    iterations = fit_by_gradient(ClosedFormNetwork(process), num_steps, Recipe(num_samples=10, batch_size=4))
    vector = ConsistentFamily(process, num_steps).start().numpy()
    momentum = np.zeros_like(vector)
    for numbers, iteration in zip((range(4), range(4, 8), range(8, 10)), iterations, strict=True):
        paper = PaperLoss(process, num_steps, numbers)
        assert iteration.loss == pytest.approx(paper(vector), rel=1e-10)
        gradient = paper.gradient(vector)
        vector = vector - 0.01 * np.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.99 * momentum + 0.01 * gradient
        timesteps, coefficients = paper.tables(vector)
        np.testing.assert_allclose(iteration.solver.timesteps, timesteps, rtol=1e-12)
        np.testing.assert_allclose(iteration.solver.coefficients, coefficients, atol=1e-12)
        assert iteration.num_samples == numbers.stop


# What is searched


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [("flow matching", "flow_prediction"), ("flow matching", "sample")]
    + [("variance preserving", kind) for kind in ("epsilon", "v_prediction", "sample", "flow_prediction")],
)
def test_the_table_with_gradients_is_the_table_of_the_solver(name, prediction_type, num_steps):
    family = ConsistentFamily(PROCESSES[name], num_steps)
    vector = some_vector(family)
    expected = family.solver(vector).update_table(prediction_type)
    torch.testing.assert_close(family.table(vector, prediction_type), expected, rtol=1e-12, atol=1e-12)


def test_the_start_is_one_step_methods_on_equal_steps(process):
    family = ConsistentFamily(process, 5)
    start = family.solver(family.start())
    expected = SearchedSolver.adams_bashforth(*time_grid(process, 5), family.frame, order=1)
    assert family.frame == {"flow_matching": "velocity", "variance_preserving": "data"}[process.kind]
    for name in ("timesteps", "alphas", "sigmas", "coefficients"):
        np.testing.assert_allclose(getattr(start, name), getattr(expected, name), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_steps", [2, 3, 4, 5, 6, 7, 8, 10])
def test_up_to_six_steps_the_last_two_are_of_second_order(num_steps):
    family = ConsistentFamily(FlowMatching(), num_steps)
    coefficients = family.solver(some_vector(family)).coefficients
    used = (coefficients != 0).sum(1).tolist()
    if num_steps <= 6:
        assert used == [*range(1, num_steps - 1), min(2, num_steps - 1), 2]
        assert np.diag(coefficients, -1)[-2:].all()
    else:
        assert used == list(range(1, num_steps + 1))
        assert len(family.start()) == num_steps * (num_steps + 1) // 2


def test_the_teacher_ends_at_the_data(process):
    teacher = recipe_teacher(process, TEACHER_STEPS)
    assert (teacher.alphas[-1], teacher.sigmas[-1]) == (1, 0)
    assert teacher.timesteps[-1] == (10 if process.kind == "flow_matching" else 0)
    assert np.array_equal(teacher.coefficients, np.eye(TEACHER_STEPS))


# On real pipelines


QUICK = Recipe(num_samples=16, batch_size=8, teacher_steps=12)
LABELS = [{"class_labels": [k], "guidance_scale": 1.0} for k in range(10)]


@pytest.fixture(scope="module", params=["digits-dit", "digits-sit"])
def pipe(request):
    return load(request.param)


@pytest.fixture(scope="module")
def sit():
    return load("digits-sit")


@pytest.fixture()
def network_of():
    """Makes networks whose calls are counted as `calls`."""
    counters = []

    def network_of(pipe, conditions=LABELS, batch_size=8, **options):
        counters.append(NetworkCalls(pipe))
        network = DifferentiableNetwork(pipe, conditions, batch_size, counters[-1], **options)
        network.calls = counters[-1]
        return network

    yield network_of
    for counter in counters:
        counter.remove()


def tables(iterations):
    return [(each.loss, each.solver.timesteps.tolist(), each.solver.coefficients.tolist()) for each in iterations]


def test_a_few_updates_beat_the_start_on_other_noises(pipe, network_of):
    network = network_of(pipe, batch_size=16)
    family = ConsistentFamily(network.process, 5)
    recipe = Recipe(num_samples=96, batch_size=16, learning_rate=0.05, teacher_steps=32)
    *_, last = fit_by_gradient(network, 5, recipe)
    batches = Teacher(pipe, 64, 32, network.calls).batches(LABELS, range(10**6, 10**6 + 32))
    searched, start = (endpoint_errors(batches, solver) for solver in (last.solver, family.solver(family.start())))
    assert searched.square().mean().sqrt() < 0.8 * start.square().mean().sqrt()
    assert (searched < start).double().mean() > 0.8


def test_the_same_seed_gives_the_same_solvers_and_another_does_not(sit, network_of):
    first, again, other = (tables(fit_by_gradient(network_of(sit, first_seed=k), 4, QUICK)) for k in (0, 0, 5))
    assert first == again
    assert first != other


def test_samples_have_the_condition_and_the_seed_of_their_number(sit, network_of):
    network = network_of(sit, [*LABELS[:2], {"class_labels": [2], "guidance_scale": 2.0}], 2, first_seed=100)
    groups = network.split(range(4, 10))
    found = {seed: condition["class_labels"] for group in groups for condition, seed in group}
    assert found == {104: [1], 105: [2], 106: [0], 107: [1], 108: [2], 109: [0]}
    assert sorted(map(len, groups)) == [2, 2, 2]


def test_how_many_samples_share_a_call_does_not_matter(sit, network_of):
    family = ConsistentFamily(FlowMatching(), 4)
    vector = some_vector(family)
    together, apart = (loss_and_gradient(network_of(sit, batch_size=k), family, vector, range(6), 12) for k in (6, 4))
    # Rounding of float32, in another order.
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-6)


def test_calls_are_a_teacher_a_run_and_one_to_open(pipe, network_of):
    network = network_of(pipe)
    list(fit_by_gradient(network, 4, QUICK))
    assert network.calls.count == 16 * (12 + 4 + 1)


def test_a_pipeline_is_frozen_while_gradients_are_taken_and_left_as_it_was(sit, network_of):
    weights = [*sit.transformer.parameters(), *sit.vae.parameters()]
    network = network_of(sit)

    def state(field=None):
        return [weight.requires_grad for weight in weights]

    before = state()
    assert before == [True] * len(weights)
    assert network.map(state, network.split(range(2))[0]) == [[False] * len(weights)]
    list(fit_by_gradient(network, 3, QUICK))
    assert state() == before
    assert all(weight.grad is None for weight in weights)


def test_when_memory_runs_out_calls_are_halved(sit, network_of, caplog):
    family = ConsistentFamily(FlowMatching(), 3)
    vector = some_vector(family)
    small, large = network_of(sit, batch_size=2), network_of(sit, batch_size=8)
    expected = loss_and_gradient(small, family, vector, range(8), 8)
    largest = []

    def run_out(module, args, kwargs):
        batch = len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        if torch.is_grad_enabled():
            largest.append(batch)
            if batch > 2:
                raise torch.OutOfMemoryError("no more")

    handle = sit.transformer.register_forward_pre_hook(run_out, with_kwargs=True)
    try:
        first = loss_and_gradient(large, family, vector, range(8), 8)
        tried = [batch for batch in largest if batch > 2]
        again = loss_and_gradient(large, family, vector, range(8), 8)
    finally:
        handle.remove()
    assert tried == [8, 4]
    assert [batch for batch in largest if batch > 2] == tried
    assert "Gradients of 8 samples in one call run out of memory: going on with half" in caplog.text
    np.testing.assert_allclose(first, expected, rtol=1e-12)
    assert first == again


def test_a_search_goes_on_from_what_was_remembered(sit, network_of):
    outcomes = []

    def record(compute):
        outcomes.append(compute())
        return outcomes[-1]

    expected = tables(fit_by_gradient(network_of(sit), 4, QUICK, record))
    kept = iter(json.loads(json.dumps(outcomes[:1])))
    network = network_of(sit)
    resumed = tables(fit_by_gradient(network, 4, QUICK, lambda compute: next(kept, None) or compute()))
    assert resumed == expected
    assert network.calls.count == 8 * (12 + 4 + 1)


SCRIPT = """
import json, sys, torch
from accelerate import PartialState
from test_gradient import LABELS, QUICK, DifferentiableNetwork, NetworkCalls, fit_by_gradient, load, tables

state = PartialState(cpu=True)
torch.set_num_threads(1)
pipe = load("digits-sit")
found = tables(fit_by_gradient(DifferentiableNetwork(pipe, LABELS, 3, NetworkCalls(pipe)), 4, QUICK))
with open(f"{sys.argv[1]}/{state.process_index} of {state.num_processes}.json", "w") as file:
    json.dump(found, file)
"""


def test_two_processes_find_what_one_finds(sit, network_of, tmp_path):
    """Calls of 3, 3 and 2 samples, so that the processes have different shares."""
    (tmp_path / "fit.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(tmp_path / "fit.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    expected = json.dumps(tables(fit_by_gradient(network_of(sit, batch_size=3), 4, QUICK)))
    for number in range(2):
        assert (tmp_path / f"{number} of 2.json").read_text() == expected


# What is refused


def test_settings_out_of_range_are_refused(sit, network_of):
    network = network_of(sit)
    with pytest.raises(ValueError, match="`num_steps` is 1, expected at least 2"):
        fit_by_gradient(network, 1)
    with pytest.raises(ValueError, match="`conditions` is empty"):
        network_of(sit, [])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_samples": 0}, "`num_samples` is 0, expected at least 1"),
        ({"batch_size": 0}, "`batch_size` is 0, expected at least 1"),
        ({"teacher_steps": 1}, "`teacher_steps` is 1, expected at least 2"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0, expected a positive number"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan, expected a positive number"),
    ],
    ids=str,
)
def test_a_recipe_out_of_range_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**setting)


def test_a_pipeline_that_hands_on_no_gradients_is_refused(network_of):
    case = build("hunyuan_dit")
    with pytest.raises(FieldError, match="hands on no gradient with respect to `timestep`"):
        next(fit_by_gradient(network_of(case.pipe, [case.inputs], 1), 3, QUICK))


def test_a_loss_that_is_not_finite_is_reported(sit, network_of):
    handle = sit.transformer.register_forward_hook(lambda module, args, output: (output[0] * float("nan"),))
    try:
        with pytest.raises(ValueError, match="After 0 noises the loss is nan .* lower `learning_rate` from 0.01"):
            next(fit_by_gradient(network_of(sit), 3, QUICK))
    finally:
        handle.remove()
