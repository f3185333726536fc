"""An application on a fake engine, with the tokenizer of a built-in model."""

import contextlib

import numpy as np
import pytest
from starlette.testclient import TestClient

from keras_gemma import GemmaCausalLMPreprocessor
from keras_gemma.causal_lm.text_engine import TextEngine
from keras_gemma.scoring.prompt_scores import PromptScores
from keras_gemma.serving import ServerSettings, create_app
from keras_gemma.text.grammar import GrammarCompiler
from tests.serving.fake_engine import FakeEngine
from tests.serving.live import live_server


@pytest.fixture(scope="session")
def preprocessor():
    return GemmaCausalLMPreprocessor.from_preset("gemma_tiny_instruct_en")


@pytest.fixture(scope="session")
def compiler(preprocessor):
    return GrammarCompiler(preprocessor.tokenizer)


@pytest.fixture
def engine(preprocessor):
    return FakeEngine(preprocessor.tokenizer)


def fake_scores(ids, count):
    """Scores of a prompt: -1 for token 1, -2 for token 2, ... and token 4 is the most likely."""
    for i in range(1, len(ids)):
        top_ids, top = np.array([[4][:count]]), np.array([[-0.5][:count]])
        yield PromptScores(np.array([-float(i)]), top_ids, top)


@pytest.fixture
def client_of(engine, preprocessor, compiler):
    """Returns a function that starts an application and returns its client."""
    with contextlib.ExitStack() as stack:

        def start(**settings):
            settings = ServerSettings(**{"served_names": ("tiny",), **settings})

            def compile_format(response_format):
                return compiler.compile(response_format)  # which tests may replace

            texts = TextEngine(engine, preprocessor, fake_scores, compile_format)
            app = create_app(texts, settings)
            return stack.enter_context(TestClient(app))

        yield start


@pytest.fixture
def client(client_of):
    return client_of()


@pytest.fixture
def live(engine, preprocessor):
    with live_server(engine, preprocessor, fake_scores) as server:
        yield server
