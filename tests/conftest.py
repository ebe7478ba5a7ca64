"""What the tests of `search/field.py` share."""

import pytest
import torch
from fields import load

from search.field import NetworkCalls, PipelineField


@pytest.fixture(scope="module")
def one_thread():
    """Tiny networks are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture()
def open_field():
    """Opens fields, each with a counter of its own as `field.calls`, and closes them after the test."""
    opened = []

    def open_field(pipe, inputs, seeds, start=None) -> PipelineField:
        calls = NetworkCalls(pipe)
        opened.append(calls.remove)
        field = PipelineField(pipe, inputs, seeds, calls, start)
        field.calls = calls
        opened.append(field.close)
        return field

    yield open_field
    for close in reversed(opened):
        close()


@pytest.fixture(scope="module")
def digits_dit():
    return load("digits-dit")
