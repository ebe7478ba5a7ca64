"""The check for GPUs runs, as far as a CPU can, so that it is ready where there is one."""

import gpu_check
import pytest


@pytest.mark.parametrize("title", gpu_check.MODELS)
def test_the_search_calls_the_networks_of_the_check_as_the_pipelines_do(title):
    calls, _ = gpu_check.of_model(gpu_check.MODELS[title])
    # A ratio of two times on a busy machine; the figure is the check's own to print.
    assert calls > 0.1


def test_the_loop_of_tensor_step_is_the_schedulers():
    for _, difference in gpu_check.graphs():
        assert difference < 1e-5
    assert {name for name, _ in gpu_check.step_costs()} == {"DPM-Solver++(2M)", "UniPC"}
