"""Clients that leave, exceptions and shutdown, on a real engine with a model of a few lines."""

import contextlib
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest

from keras_gemma.causal_lm.text_engine import TextEngine
from keras_gemma.generation import engine as engine_module
from keras_gemma.serving.server import ENGINE_FAILED
from keras_gemma.serving.settings import ServerSettings
from tests.generation.fake_model import FakeModel
from tests.serving.live import live as live_server
from tests.serving.test_lifecycle import APIS, send

pytestmark = pytest.mark.once

COMPLETIONS = "/v1/completions"
SHORT = {"prompt": [5, 6, 7], "max_tokens": 5}
LONG = {"prompt": [5, 6, 7], "max_tokens": 400, "stream": True}


def with_scores(chosen):
    """Returns the tokens with a log-probability of 0, which TGI's routes ask for."""
    rows = len(chosen.ids)
    top_ids, top = np.zeros((rows, 20), "int32"), np.zeros((rows, 20), "float32")
    scores = {"logprobs": np.zeros(rows, "float32"), "top_ids": top_ids, "top_logprobs": top}
    return chosen._replace(**scores)


class Model(FakeModel):
    """Slots that take their time, and never choose a stop token."""

    delay = 0.0
    prefixes = SimpleNamespace(num_bytes=0)

    def insert(self, *arguments):
        return with_scores(super().insert(*arguments))

    def decode(self, *arguments):
        time.sleep(self.delay)
        return [with_scores(chosen) for chosen in super().decode(*arguments)]

    def is_done(self, slot):
        request, _, count = self.rows[slot]
        return count == request.max_new_tokens

    def next_ids(self, slots):
        ids = super().next_ids(slots)
        return np.where(ids < 0, ids, ids + 200)


@pytest.fixture
def model(monkeypatch):
    model = Model()
    monkeypatch.setattr(engine_module, "Slots", lambda programs, size: model)
    monkeypatch.setattr(engine_module, "_check_memory", lambda *arguments: None)
    return model


@pytest.fixture
def engine(model, preprocessor):
    size = preprocessor.tokenizer.vocabulary_size()
    config = SimpleNamespace(context_length=512, vocabulary_size=size)
    programs = SimpleNamespace(config=config, without_limit=lambda: None)
    return engine_module.Engine(programs, max_batch_size=2)


@pytest.fixture
def live(engine, preprocessor):
    settings = ServerSettings(served_names=("tiny",), drain_seconds=0.1)
    with live_server(TextEngine(engine, preprocessor), settings) as server:
        yield server


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ask(live, body=SHORT):
    return httpx2.post(live.url + COMPLETIONS, json=body, timeout=60)


def check_alive(live, engine):
    assert ask(live).status_code == 200
    wait_until(lambda: engine.stats().slots_used == 0)
    assert engine.stats().num_running == engine.stats().num_waiting == 0


@pytest.mark.parametrize(("path", "body"), APIS)
def test_a_client_that_leaves_frees_its_slot(live, engine, model, path, body):
    model.delay = 0.02
    with contextlib.closing(send(live, path, body)):
        wait_until(lambda: engine.stats().slots_used)
    wait_until(lambda: not engine.stats().slots_used)
    assert engine.stats().num_cancelled >= 1
    model.delay = 0.0
    check_alive(live, engine)


def test_a_client_that_leaves_the_queue(live, engine, model):
    model.delay = 0.02
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(contextlib.closing(send(live, COMPLETIONS, LONG)))
        wait_until(lambda: engine.stats().slots_used == 2)
        with contextlib.closing(send(live, COMPLETIONS, SHORT)):
            wait_until(lambda: engine.stats().num_waiting)
        wait_until(lambda: not engine.stats().num_waiting)
        assert engine.stats().slots_used == 2
    model.delay = 0.0
    check_alive(live, engine)


@pytest.mark.parametrize("call", ["chunk", "insert", "decode"])
def test_an_exception_ends_only_its_requests(live, engine, model, call):
    expected = ask(live).json()["choices"][0]["text"]
    model.failing[call] = 0
    response = ask(live)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error" and call not in response.text
    assert engine.stats().num_restarts == (call != "chunk")
    assert ask(live).json()["choices"][0]["text"] == expected
    check_alive(live, engine)


def test_an_exception_in_a_stream_is_an_event(live, engine, model):
    model.failing["decode"] = 3
    events = [line for line in ask(live, LONG).text.splitlines() if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert len(events) > 1 and '"error"' not in events[0]
    check_alive(live, engine)


def test_three_failures_in_a_row_end_the_process(live, engine, model):
    for _ in range(engine_module.MAX_FAILURES):
        model.failing["chunk"] = 0
        assert ask(live).status_code == 500
    live.join()
    assert live.server.exit_code == ENGINE_FAILED and not engine.is_accepting


def test_the_drain_ends_streams_with_an_error(live, engine, model):
    model.delay = 0.02
    with httpx2.stream("POST", live.url + COMPLETIONS, json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        live.signal()
        *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
    live.join()
    assert engine.stats().slots_used == 0


def test_answers_under_exceptions_are_right_or_failed(live, engine, model, monkeypatch):
    """Every 17th call of the model fails, so that it never fails three times in a row."""
    bodies = [SHORT | {"prompt": [5 + i, 6], "n": 1 + i % 2} for i in range(6)]
    expected = [[choice["text"] for choice in ask(live, body).json()["choices"]] for body in bodies]
    calls = itertools.count(1)

    def fail(call):
        if next(calls) % 17 == 0:
            raise RuntimeError("a fault")

    monkeypatch.setattr(model, "fail_if_told", fail)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: ask(live, bodies[i % 6]), range(60)))
    statuses = {answer.status_code for answer in answers}
    for i, answer in enumerate(answers):
        if answer.status_code == 200:
            assert [c["text"] for c in answer.json()["choices"]] == expected[i % 6]
    monkeypatch.undo()
    assert statuses == {200, 500} and engine.stats().num_restarts
    check_alive(live, engine)
