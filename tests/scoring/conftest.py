"""The conditions of all tests of scoring."""

import pytest

from tests.generation.models import on_torch


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
