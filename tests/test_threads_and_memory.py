"""One scheduler under several threads, and what many runs leave behind."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipelines import build

from diffusers_searched_solver import FlowMatching, SearchedSolver, SearchedSolverScheduler, SolverFile, time_grid
from diffusers_searched_solver.history import History


CONFIG = FlowMatchEulerDiscreteScheduler().config
STEP_COUNTS = 2, 3, 4
NOISES = [torch.linspace(-1, 1, 5), torch.linspace(2, 0, 5)]


def make_scheduler():
    tables = {n: SearchedSolver.adams_bashforth(*time_grid(FlowMatching(), n), "velocity", 2) for n in STEP_COUNTS}
    return SearchedSolverScheduler.from_config(CONFIG, solver=SolverFile(tables, FlowMatching(), "flow_prediction"))


def network(x, t):
    return torch.sin(3 * x + float(t) / 300)


def loop(scheduler, num_steps, x, begin=0):
    """A pipeline's loop, which pauses between its calls of the scheduler."""
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps
    yield
    if begin:
        scheduler.set_begin_index(begin)
        yield
    for t in timesteps[begin:]:
        x = scheduler.step(network(x, t), t, x).prev_sample
        yield
    return x


def go_on(running) -> torch.Tensor | RuntimeError | None:
    """Let a loop run until its next pause, and hand over what it ends with."""
    try:
        next(running)
    except StopIteration as end:
        return end.value
    except RuntimeError as error:
        return error


def alone(*arguments):
    running = loop(make_scheduler(), *arguments)
    while (found := go_on(running)) is None:
        pass
    return found


@pytest.fixture()
def threads():
    executors = [ThreadPoolExecutor(1) for _ in range(2)]
    yield [lambda *call, e=executor: e.submit(*call).result() for executor in executors]
    for executor in executors:
        executor.shutdown()


runs = st.tuples(st.sampled_from(STEP_COUNTS), st.sampled_from(NOISES), st.integers(0, 1))


@settings(deadline=None, max_examples=300)
@given(first=runs, second=runs, turns=st.lists(st.integers(0, 1), max_size=14))
def test_runs_of_two_threads_with_one_scheduler_are_right_or_refused_in_any_order(first, second, turns):
    loops, ends = [loop(scheduler := make_scheduler(), *first), loop(scheduler, *second)], [None, None]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for turn in [*turns, *[0] * 7, *[1] * 7]:
            if ends[turn] is None:
                ends[turn] = (one, other)[turn].submit(go_on, loops[turn]).result()
    for end, arguments in zip(ends, (first, second), strict=True):
        if isinstance(end, RuntimeError):
            assert "Another thread has begun a run with this scheduler" in str(end)
        else:
            torch.testing.assert_close(end, alone(*arguments), rtol=0, atol=0)


def test_one_run_after_another_in_two_threads_works(threads):
    scheduler = make_scheduler()
    for thread, noise in zip(threads, NOISES, strict=True):
        running = loop(scheduler, 3, noise)
        while (end := thread(go_on, running)) is None:
            pass
        torch.testing.assert_close(end, alone(3, noise), rtol=0, atol=0)


def test_one_run_may_go_from_thread_to_thread(threads):
    """As where a web server draws the images of a generator."""
    running, turn = loop(make_scheduler(), 4, NOISES[0]), 0
    while (end := threads[turn](go_on, running)) is None:
        turn = 1 - turn
    torch.testing.assert_close(end, alone(4, NOISES[0]), rtol=0, atol=0)


def test_a_run_may_be_begun_in_one_thread_and_stepped_with_copied_timesteps_in_another(threads):
    for executors in [threads], [threads, threads]:
        scheduler = make_scheduler()
        for begin, go in executors:
            begin(scheduler.set_timesteps, 4)
            timesteps, x = [float(t) for t in scheduler.timesteps], NOISES[0]
            for t in timesteps:
                x = go(scheduler.step, network(x, t), t, x).prev_sample
            torch.testing.assert_close(x, alone(4, NOISES[0]), rtol=0, atol=0)


def test_a_thread_whose_run_was_displaced_is_refused_with_copied_timesteps(threads):
    """Nobody could tell that its steps are not of the run that displaced its own."""
    scheduler = make_scheduler()
    threads[0](scheduler.set_timesteps, 4)
    t, x = float(scheduler.timesteps[0]), NOISES[0]
    threads[1](scheduler.set_timesteps, 4)
    with pytest.raises(RuntimeError, match="Another thread has begun a run"):
        threads[0](scheduler.step, network(x, t), t, x)
    threads[1](scheduler.step, network(x, t), t, x)


def test_a_step_that_has_begun_ends_in_its_own_run_though_another_thread_begins_one(threads, monkeypatch):
    scheduler, step = make_scheduler(), History.step
    scheduler.set_timesteps(4)
    t, x = scheduler.timesteps[0], NOISES[0]
    expected = copy.deepcopy(scheduler).step(network(x, t), t, x).prev_sample

    def interrupted(history, sample):
        monkeypatch.undo()
        threads[0](scheduler.set_timesteps, 2)
        return step(history, sample)

    monkeypatch.setattr(History, "step", interrupted)
    torch.testing.assert_close(scheduler.step(network(x, t), t, x).prev_sample, expected, rtol=0, atol=0)
    assert scheduler.step_index is None
    assert scheduler.model_outputs == []


def test_copies_of_a_scheduler_run_side_by_side(threads):
    scheduler = make_scheduler()
    loops = [loop(copy.deepcopy(scheduler), 4, noise) for noise in NOISES]
    ends = [None, None]
    while any(end is None for end in ends):
        ends = [thread(go_on, running) for thread, running in zip(threads, loops, strict=True)]
    for end, noise in zip(ends, NOISES, strict=True):
        torch.testing.assert_close(end, alone(4, noise), rtol=0, atol=0)


def resident_bytes() -> int:
    """The memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def count_tensors() -> int:
    gc.collect()
    return sum(1 for each in gc.get_objects() if issubclass(type(each), torch.Tensor))


def test_a_thousand_generations_leave_nothing_behind():
    case = build("dit")
    case.attach(SearchedSolverScheduler.from_config(case.config))

    def generate(count):
        for seed in range(count):
            case(seed, num_inference_steps=2)

    generate(100)
    tensors, resident = count_tensors(), resident_bytes()
    generate(1000)
    assert count_tensors() == tensors
    # A state of this pipeline has 2 kB: a thousand kept ones would be seen in the count, larger things here.
    assert resident_bytes() - resident < 8 * 2**20
