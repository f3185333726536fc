"""One model with text for all tests of the task that leave its weights alone."""

import pytest

from tests.generation.models import make_lm, on_torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products of this size are slower in several threads than in one, on PyTorch by far."""
    if not on_torch():
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm(proto=tiny_proto)
