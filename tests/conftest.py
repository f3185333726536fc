"""What every test may count on: a chosen backend, a seed, and a small vocabulary."""

import os

import keras
import pytest

from tests.configurations import VOCABULARY_SIZE

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


def pytest_report_header() -> str:
    return f"keras {keras.__version__} on {keras.config.backend()}"


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def tiny_proto() -> bytes:
    """A SentencePiece model with Gemma's settings, as large as `configurations.py` says: bytes."""
    from keras_gemma.text.vocabulary import train_vocabulary

    return train_vocabulary(TEXTS, VOCABULARY_SIZE)


@pytest.fixture
def command_environment(tmp_path) -> dict[str, str]:
    """The environment for a process of its own: this backend, and no Keras configuration."""
    return {
        **os.environ,
        "KERAS_BACKEND": keras.config.backend(),
        "KERAS_HOME": str(tmp_path / "keras_home"),
    }
