"""The command `keras-gemma` with a model that fails at random, for the soak of serve.py.

    SERVE_FAULTS=0.003 SERVE_FAULT_SEED=1 \\
        python examples/benchmarks/serve_faulty.py serve gemma_tiny_en --backend jax

`SERVE_FAULTS` is the share of decode calls and prompt chunks that raise an exception. Three in a
row end the server, so a share above 0.01 ends it soon.
"""

import functools
import os
import random
import sys
from collections.abc import Callable
from typing import Any

from keras_gemma.backend_choice import use_backend


class InjectedError(RuntimeError):
    """Exception of the model."""


def failing(function: Callable[..., Any], share: float, generator: random.Random) -> Any:
    """Returns `function` with exceptions in a share of its calls."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if generator.random() < share:
            raise InjectedError(f"{function.__qualname__} fails for this test.")
        return function(*arguments, **options)

    return call


def inject(share: float, seed: int) -> None:
    """Makes the model of all engines fail."""
    use_backend(os.environ.get("KERAS_BACKEND"))
    from keras_gemma.generation.slots import RequestPrefill, Slots

    generator = random.Random(seed)
    Slots.decode = failing(Slots.decode, share, generator)
    RequestPrefill.read_chunk = failing(RequestPrefill.read_chunk, share, generator)


if __name__ == "__main__":
    inject(float(os.environ["SERVE_FAULTS"]), int(os.environ.get("SERVE_FAULT_SEED", 0)))
    from keras_gemma.cli import main

    sys.exit(main())
