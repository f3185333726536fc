"""Fixtures of all tests: backend, seed and a small vocabulary."""

import gc
import os
import random
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import pytest
from keras.src.utils import rng_utils

from tests.configurations import VOCABULARY_SIZE
from tests.models import quickly

TEXTS = [
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "the slings and arrows of outrageous fortune, or to take arms against a sea of troubles,",
    "and by opposing end them. To die: to sleep; no more; and by a sleep to say we end",
    "the heart-ache and the thousand natural shocks that flesh is heir to, 'tis a consummation",
    "devoutly to be wish'd. To die, to sleep; to sleep: perchance to dream: ay, there's the rub;",
    "for in that sleep of death what dreams may come when we have shuffled off this mortal coil",
    "must give us pause: there's the respect that makes calamity of so long life.",
]
"""Hamlet, act 3, scene 1."""

BACKEND_FREE = (
    "benchmark/test_arithmetic.py",
    "cli/test_documented.py",
    "cli/test_presets.py",
    "cli/test_printing.py",
    "generation/test_scheduler.py",
    "quantization/test_config.py",
    "storage/test_downloads.py",
    "storage/test_published_tokenizers.py",
    "storage/test_tokenizer_json.py",
    "storage/test_upload.py",
    "test_backend_choice.py",
    "test_catalogue.py",
    "test_checks.py",
    "test_config.py",
    "test_docs.py",
    "test_floors.py",
    "test_prose.py",
    "text/test_chat.py",
    "text/test_grammar.py",
    "text/test_pieces.py",
    "text/test_stream.py",
    "text/test_tools.py",
    "text/test_vocabulary.py",
    "training/test_chat_dataset.py",
)
"""Files of tests that do not depend on the backend. They run only on JAX, as `once` tests do."""

SLOWEST = ("test_examples.py", "generation/test_speculative.py", "storage/test_streaming.py")
"""Files that run first, so that no worker has to wait for them at the end."""

TESTS = Path(__file__).parent


def file_name(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).as_posix()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: file_name(item) not in SLOWEST)
    if keras.config.backend() != "jax":
        once = {item for item in items if is_backend_free(item)}
        config.hook.pytest_deselected(items=list(once))
        items[:] = [item for item in items if item not in once]


def leave_out_of_collections() -> None:
    """Collects garbage, and never looks at the objects that survive again.

    Imported modules and compiled programs are millions of objects. Keras starts collections by the
    dozen, and Python does for a long list.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    leave_out_of_collections()


def is_backend_free(item: pytest.Item) -> bool:
    return file_name(item) in BACKEND_FREE or item.get_closest_marker("once") is not None


def pytest_report_header() -> str:
    return f"keras {keras.__version__} on {keras.config.backend()}"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Compiles with few optimizations. Modules that test compiled programs override it."""
    with quickly():
        yield


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect() -> Iterator[None]:
    yield
    leave_out_of_collections()


def seed_tensorflow(seed: int) -> None:
    """Sets TensorFlow's seed, but does not discard all compiled functions for that."""
    from tensorflow.python.eager import context

    context.context()._seed = seed
    context.context()._rng = random.Random(seed)


@pytest.fixture(scope="session", autouse=True)
def quick_seeds() -> Iterator[None]:
    """Makes Keras seed TensorFlow quickly, and not import it on other backends."""
    on_tensorflow = keras.config.backend() == "tensorflow"
    functions = types.SimpleNamespace(set_seed=seed_tensorflow)
    with pytest.MonkeyPatch.context() as patch:
        tf = types.SimpleNamespace(available=on_tensorflow, random=functions)
        patch.setattr(rng_utils, "tf", tf)
        yield


@pytest.fixture(autouse=True)
def seeded(quick_seeds: None) -> None:
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def tiny_proto() -> bytes:
    """A SentencePiece model with Gemma's settings, as large as `configurations.py` says: bytes."""
    from keras_gemma.text.vocabulary import train_vocabulary

    return train_vocabulary(TEXTS, VOCABULARY_SIZE)


@pytest.fixture
def command_environment(tmp_path) -> dict[str, str]:
    """Environment of a subprocess: this backend, and no Keras configuration."""
    return {
        **os.environ,
        "KERAS_BACKEND": keras.config.backend(),
        "KERAS_HOME": str(tmp_path / "keras_home"),
    }


@pytest.fixture
def run_on_devices(command_environment) -> Callable[..., str]:
    """Returns a function that runs a program on simulated devices of JAX, and returns its output.

    XLA's threads are as many as cores, and devices block them while they wait for each other.
    """

    def run(program: str, devices: int, **environment: str) -> str:
        flags = f"--xla_force_host_platform_device_count={devices}"
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=command_environment | {"XLA_FLAGS": flags, "NPROC": "64"} | environment,
            cwd=TESTS.parent,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    return run
