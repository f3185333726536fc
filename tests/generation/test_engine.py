"""The engine with tiny models: its tokens are those of `generate`, row by row."""

import asyncio
import threading

import numpy as np
import pytest

from keras_gemma.generation import prefill
from keras_gemma.generation.engine import batch_sizes
from keras_gemma.generation.engine_request import (
    ContextLengthError,
    EngineRequest,
    EngineStoppedError,
    QueueFullError,
)
from tests.models import make_lm

PROMPTS = [[2, 9, 31, 8, 300], [2, 40], [2, *range(50, 120)], [7], [2, 9, 31], [2, *range(9, 30)]]
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.5, "seed": 3, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.2, "seed": -7, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"temperature": 1.0, "seed": 2**40, "num_return_sequences": 3},
]
COUNTS = [20, 31, 5, 1, 17, 12]


def requests(**changes):
    return [
        EngineRequest(np.array(ids, "int32"), max_new_tokens=count, **settings | changes)
        for ids, count, settings in zip(PROMPTS, COUNTS, SETTINGS, strict=True)
    ]


def generated(lm, request):
    """The new tokens of `generate` for a request, one list per sequence."""
    names = ("top_k", "top_p", "min_p", "seed", "repetition_penalty")
    settings = {name: getattr(request, name) for name in names}
    if request.temperature:
        settings |= {"temperature": request.temperature}
        settings |= {"num_return_sequences": request.num_return_sequences}
    texts = lm.generate(
        [request.prompt.tolist()],
        max_new_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_token_ids) or None,
        strip_prompt=True,
        **settings,
    )
    return texts[0] if request.num_return_sequences > 1 else texts


def run_all(engine, requests):
    handles = [engine.add_request(request) for request in requests]
    while engine.has_work:
        engine.step()
    return [handle.result(0) for handle in handles]


def run(engine, requests):
    outputs = run_all(engine, requests)
    for sequences in outputs:
        for output in sequences:
            assert output.error is None
    return outputs


def ids_of(outputs):
    return [[output.ids for output in sequences] for sequences in outputs]


@pytest.fixture(scope="module")
def expected(lm):
    return [generated(lm, request) for request in requests()]


@pytest.mark.parametrize("options", [{}, {"pinned": True}], ids=["ladder", "pinned"])
def test_same_tokens_as_generate(lm, expected, options):
    engine = lm.engine(max_batch_size=3, **options)
    assert ids_of(run(engine, requests())) == expected
    stats = engine.stats()
    assert stats.generation_tokens == sum(len(ids) for texts in expected for ids in texts)
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.slots_used == stats.num_running == stats.num_waiting == 0


def test_requests_that_come_later(lm, expected):
    engine, handles = lm.engine(max_batch_size=3), []
    for request in requests():
        handles.append(engine.add_request(request))
        for _ in range(3):
            engine.step()
    while engine.has_work:
        engine.step()
    assert ids_of([handle.result(0) for handle in handles]) == expected


def test_stop_tokens_of_each_request(lm, expected):
    texts = expected[0][0], expected[1][0]
    stops = [text[len(text) // 2] for text in texts]
    changed = [
        EngineRequest(
            np.array(ids, "int32"), max_new_tokens=count, stop_token_ids=(stop, 5), **settings
        )
        for ids, count, stop, settings in zip(PROMPTS[:2], COUNTS, stops, SETTINGS, strict=False)
    ]
    outputs = run(lm.engine(max_batch_size=2), changed)
    for text, stop, (output,) in zip(texts, stops, outputs, strict=True):
        assert output.ids == text[: text.index(stop) + 1]
        assert output.finish_reason == "stop"


def test_logprobs(lm):
    engine = lm.engine(max_batch_size=2)
    plain = requests()[1]
    with_logprobs = requests(top_logprobs=3)[1]
    (output,), (other,) = run(engine, [with_logprobs, requests()[0]])
    assert other.logprobs is None
    (completion,) = lm.generate(
        [plain.prompt.tolist()],
        max_new_tokens=plain.max_new_tokens,
        stop_token_ids=None,
        temperature=0.9,
        seed=3,
        return_logprobs=3,
    )
    assert output.ids == completion.token_ids
    np.testing.assert_allclose(output.logprobs, completion.logprobs, atol=1e-4)
    tops = [
        dict(zip(ids.tolist(), values.tolist(), strict=True))
        for ids, values in zip(output.top_ids, output.top_logprobs, strict=True)
    ]
    assert [set(top) for top in tops] == [set(top) for top in completion.top_logprobs]


def test_penalties_and_bias(lm):
    """Greedy tokens by logits that change as OpenAI's formula says."""
    prompt, frequency, presence, bias = [2, 9, 31], 0.8, 0.3, {44: 2.5, 9: -100.0}
    text, counts = [], {}
    for _ in range(8):
        logits = np.array(lm.score([prompt + text])[0][-1], "float64")
        for id, count in counts.items():
            logits[id] -= count * frequency + presence
        for id, value in bias.items():
            logits[id] += value
        text.append(int(logits.argmax()))
        counts[text[-1]] = counts.get(text[-1], 0) + 1
    request = EngineRequest(
        np.array(prompt, "int32"),
        max_new_tokens=8,
        temperature=0.0,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
    )
    outputs = run(lm.engine(max_batch_size=2), [requests()[1], request])
    assert outputs[1][0].ids == text


class Even:
    """Constraint to even tokens."""

    def __init__(self, size):
        bits = np.arange(-(-size // 32) * 32).reshape(-1, 32) % 2 == 0
        self.words = (
            (bits * 2 ** np.arange(32, dtype="int64")).sum(1).astype("uint32").view("int32")
        )
        self.accepted = []

    def allowed(self):
        return self.words

    def accept(self, token_id):
        self.accepted.append(token_id)


def test_constraint(lm, expected):
    made = []

    def make():
        made.append(Even(lm.backbone.config.vocabulary_size))
        return made[-1]

    (constrained,) = requests(constraint=make)[5:]
    outputs = run(lm.engine(max_batch_size=4), [*requests()[:2], constrained])
    assert ids_of(outputs)[:2] == expected[:2]
    assert len(made) == 3
    for output in outputs[2]:
        assert all(id % 2 == 0 for id in output.ids)
    assert sorted(one.accepted for one in made) == sorted(o.ids[:-1] for o in outputs[2])


def test_a_constraint_that_fails_ends_its_sequence_only(lm, expected, caplog):
    class Failing(Even):
        def allowed(self):
            if len(self.accepted) == 3:
                raise ValueError("too complex")
            return super().allowed()

    def never():
        raise ValueError("not at all")

    size = lm.backbone.config.vocabulary_size
    plain, *_ = requests()
    failing = [requests(constraint=make)[1] for make in (lambda: Failing(size), never)]
    outputs = run_all(lm.engine(max_batch_size=4), [plain, *failing])
    assert ids_of(outputs)[0] == expected[0]
    assert [str(output.error) for (output,) in outputs[1:]] == ["too complex", "not at all"]
    assert [len(output.ids) for (output,) in outputs[1:]] == [3, 0]
    assert "A constraint failed" in caplog.text


def test_stored_prefixes_change_nothing(lm, monkeypatch):
    monkeypatch.setattr(prefill, "MAX_CHUNK_TOKENS", 16)
    engine = lm.engine(max_batch_size=2, prefix_cache_bytes=1 << 20)
    prompt = np.array([2, *range(50, 120)], "int32")
    other = np.concatenate([prompt[:40], np.arange(200, 230, dtype="int32")])

    def ask(ids, salt=""):
        request = EngineRequest(ids, max_new_tokens=6, temperature=0.0, cache_salt=salt)
        handle = engine.add_request(request)
        while engine.has_work:
            engine.step()
        return handle.result(0)[0].ids, handle.num_cached_tokens

    first, cached = ask(prompt)
    assert cached == 0
    assert ask(prompt) == (first, 64)
    assert ask(prompt, "another user") == (first, 0)
    expected = lm.generate(
        [other.tolist()], max_new_tokens=6, stop_token_ids=None, strip_prompt=True
    )
    assert ask(other) == (expected[0], 32)
    stats = engine.stats()
    assert stats.prefix_cache_hits == 96 and stats.prefix_cache_queries == 71 * 3 + 70
    assert 0 < stats.prefix_cache_bytes <= 1 << 20


def test_stored_prefixes_are_bounded(lm, monkeypatch):
    monkeypatch.setattr(prefill, "MAX_CHUNK_TOKENS", 16)
    config = lm.backbone.config
    block = 16 * config.num_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    engine = lm.engine(max_batch_size=1, prefix_cache_bytes=3 * block)
    for first in range(5):
        ids = np.arange(first, first + 40, dtype="int32")
        run(engine, [EngineRequest(ids, max_new_tokens=1, temperature=0.0)])
        assert engine.stats().prefix_cache_bytes <= 3 * block
    assert engine.stats().prefix_cache_bytes == 3 * block


def test_equal_bits_under_any_load_in_bfloat16():
    """With a pinned batch size, log-probabilities do not depend on the other rows."""
    lm = make_lm("gemma2_grouped", dtype="bfloat16")
    alone = [
        run(lm.engine(max_batch_size=4, pinned=True), [request])[0]
        for request in requests(top_logprobs=0)
    ]
    together = run(lm.engine(max_batch_size=4, pinned=True), requests(top_logprobs=0)[::-1])[::-1]
    for sequences, others in zip(alone, together, strict=True):
        for output, other in zip(sequences, others, strict=True):
            assert output.ids == other.ids
            np.testing.assert_array_equal(output.logprobs, other.logprobs)


def test_cancel(lm, expected):
    engine = lm.engine(max_batch_size=2)
    handles = [engine.add_request(request) for request in requests()]
    engine.step()
    engine.step()
    handles[0].cancel()
    handles[5].cancel(1)
    while engine.has_work:
        engine.step()
    outputs = [handle.result(0) for handle in handles]
    (first,) = outputs[0]
    assert first.finish_reason == "cancelled" and 0 < len(first.ids) < COUNTS[0]
    assert first.ids == expected[0][0][: len(first.ids)]
    assert [output.finish_reason for output in outputs[5]] == ["length", "cancelled", "length"]
    assert [outputs[5][i].ids for i in (0, 2)] == [expected[5][i] for i in (0, 2)]
    assert engine.stats().slots_used == 0


def test_asyncio(lm, expected):
    engine = lm.engine(max_batch_size=3)
    engine.start()

    async def read(request):
        texts = [[] for _ in range(request.num_return_sequences)]
        async for output in engine.add_request(request):
            texts[output.index] += output.ids
        return texts

    async def read_all():
        return await asyncio.gather(*(read(request) for request in requests()))

    try:
        assert asyncio.run(read_all()) == expected
        assert engine.is_healthy
    finally:
        engine.stop()
    assert not engine.is_healthy and not engine.is_accepting


def test_threads_and_callbacks(lm, expected):
    engine = lm.engine(max_batch_size=3)
    engine.start()
    results = {}

    def ask(i):
        results[i] = engine.add_request(requests()[i]).result(60)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids_of([results[i] for i in range(len(PROMPTS))]) == expected
    finished, outputs = threading.Event(), []

    def on_output(output):
        outputs.append(output)
        if output.finish_reason:
            finished.set()

    engine.add_request(requests()[0], on_output)
    assert finished.wait(60)
    assert [id for output in outputs for id in output.ids] == expected[0][0]
    threads = engine.run_parts(threading.current_thread() for _ in range(3)).result(60)
    assert [thread.name for thread in threads] == ["engine"] * 3
    with pytest.raises(ZeroDivisionError):
        engine.run_parts(1 / n for n in (1, 0)).result(60)
    engine.drain(60)
    with pytest.raises(EngineStoppedError, match="The engine has stopped"):
        engine.add_request(requests()[0])
    with pytest.raises(EngineStoppedError):
        engine.run_parts(iter([1]))


def test_a_callback_that_fails_cancels_its_request(lm, expected, caplog):
    engine = lm.engine(max_batch_size=2)
    calls = []

    def on_output(output):
        calls.append(output)
        raise KeyError("mine")

    engine.add_request(requests()[0], on_output)
    other = engine.add_request(requests()[1])
    while engine.has_work:
        engine.step()
    assert calls[-1].finish_reason == "cancelled"
    assert [output.ids for output in other.result(0)] == expected[1]
    assert "`on_output` of a request failed" in caplog.text


def test_errors_of_the_model(lm, expected, monkeypatch, caplog):
    engine = lm.engine(max_batch_size=2)
    handles = [engine.add_request(request) for request in requests()[:3]]
    for _ in range(3):
        engine.step()
    decode = engine._slots.decode

    def fail(*args):
        monkeypatch.setattr(engine._slots, "decode", decode)
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine._slots, "decode", fail)
    while engine.has_work:
        engine.step()
    outputs = [handle.result(0) for handle in handles]
    assert [o.finish_reason for (o,) in outputs] == ["error", "error", "length"]
    assert str(outputs[0][0].error) == "the device is gone"
    assert outputs[2][0].ids == expected[2][0]
    assert engine.is_accepting and engine.stats().num_restarts == 1

    def always(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(engine._slots, "decode", always)
    handles = [engine.add_request(request) for request in [*requests()[:4], requests()[0]]]
    while engine.has_work:
        engine.step()
    for handle in handles:
        assert all(o.finish_reason in ("error", "length") for o in handle.result(0))
    with pytest.raises(EngineStoppedError, match="failed three times in a row"):
        engine.add_request(requests()[0])


def test_a_fault_of_the_engine_ends_its_requests(lm, monkeypatch, caplog):
    engine = lm.engine(max_batch_size=1)
    monkeypatch.setattr(engine._scheduler, "turn", lambda: 1 / 0)
    engine.start()
    (output,) = engine.add_request(requests()[0]).result(60)
    assert isinstance(output.error, EngineStoppedError)
    with pytest.raises(EngineStoppedError, match="has failed: division by zero"):
        engine.add_request(requests()[0])
    assert not engine.is_healthy and not engine.is_accepting
    assert "The engine has failed" in caplog.text


def test_parts_of_other_work_alternate_with_steps(lm, expected):
    engine = lm.engine(max_batch_size=1, max_queued_requests=2)
    handle, order = engine.add_request(requests()[0]), []

    def parts(name):
        for i in range(3):
            order.append((name, engine.stats().generation_tokens))
            yield i

    futures = [engine.run_parts(parts("first")), engine.run_parts(parts("second"))]
    with pytest.raises(QueueFullError, match="wait to be scored"):
        engine.run_parts(parts("third"))
    futures[1].cancel()
    while engine.has_work:
        engine.step()
    assert futures[0].result(0) == [0, 1, 2]
    assert [name for name, _ in order] == ["first"] * 3
    assert order[0][1] < order[1][1] < order[2][1]
    assert handle.result(0)[0].ids == expected[0][0]
    waiting = engine.run_parts(parts("fourth"))
    gone = engine.run_parts(parts("fifth"))
    gone.cancel()
    engine.stop()
    with pytest.raises(EngineStoppedError):
        waiting.result(0)


def test_finish_is_not_a_cancellation(lm, expected):
    engine = lm.engine(max_batch_size=2)
    handle = engine.add_request(requests()[0])
    engine.step()
    handle.finish(0)
    engine.step()
    (output,) = handle.result(0)
    assert output.finish_reason == "stop"
    assert output.ids == expected[0][0][: len(output.ids)]
    assert engine.stats().num_cancelled == 0


def test_drain_ends_what_takes_too_long(lm):
    engine = lm.engine(max_batch_size=1)
    decode = engine._slots.decode
    engine._slots.decode = lambda *args: threading.Event().wait(0.05) or decode(*args)
    engine.start()
    handle = engine.add_request(EngineRequest(np.array([2], "int32"), 100, temperature=0.0))
    engine.drain(0.1)
    (output,) = handle.result(60)
    assert output.finish_reason == "error"
    assert isinstance(output.error, EngineStoppedError)


def test_full_queue(lm):
    engine = lm.engine(max_batch_size=1, max_queued_requests=2, max_queued_tokens=10)
    ask = EngineRequest(np.arange(2, 8, dtype="int32"), 4, temperature=0.0)
    first = engine.add_request(ask)
    with pytest.raises(QueueFullError, match="6 prompt tokens wait") as caught:
        engine.add_request(ask)
    assert 1 <= caught.value.retry_after <= 60
    engine.step()  # now the first one has a slot
    second = engine.add_request(ask)
    while engine.has_work:
        engine.step()
    assert first.result(0)[0].ids == second.result(0)[0].ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer"),
        ({"temperature": -1.0}, "`temperature` must be"),
        ({"temperature": float("nan")}, "`temperature` must be"),
        ({"top_p": 0.0}, "`top_p` must be"),
        ({"top_k": 0}, "`top_k` must be"),
        ({"min_p": 2.0}, "`min_p` must be"),
        ({"seed": 0.5}, "`seed` must be"),
        ({"num_return_sequences": 1000}, "`num_return_sequences` must be"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be"),
        ({"frequency_penalty": float("inf")}, "`frequency_penalty` must be"),
        ({"top_logprobs": 21}, "`top_logprobs` must be"),
        ({"logit_bias": {-1: 1.0}}, "`logit_bias`"),
        ({"logit_bias": {3: float("nan")}}, "`logit_bias`"),
        ({"stop_token_ids": tuple(range(9))}, "`stop_token_ids` must have at most 8 ids"),
        ({"prompt": np.array([], "int32")}, "`prompt` must have at least one token"),
        ({"prompt": np.array([2, 10**6], "int32")}, "`prompt`"),
    ],
)
def test_bad_requests(lm, changes, message):
    settings = {"prompt": np.array([2], "int32"), "max_new_tokens": 4} | changes
    with pytest.raises(ValueError, match=message):
        lm.engine(max_batch_size=1).add_request(EngineRequest(**settings))


def test_too_long(lm):
    engine = lm.engine(max_batch_size=1, max_length=20)
    with pytest.raises(ContextLengthError, match="at most 20 tokens in all"):
        engine.add_request(EngineRequest(np.ones(10, "int32"), max_new_tokens=11))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "`max_batch_size` must be"),
        ({"max_length": 10**6}, "`max_length` must be"),
        ({"prefix_cache_bytes": -1}, "`prefix_cache_bytes` must be"),
        ({"max_queued_tokens": 0}, "`max_queued_tokens` must be"),
    ],
)
def test_bad_options(lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm.engine(**options)


def test_too_many_slots_for_the_memory(lm, monkeypatch):
    monkeypatch.setattr("keras_gemma.backend.free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="Pass a smaller `max_batch_size`"):
        lm.engine()


def test_batch_sizes():
    assert batch_sizes(1) == (1,)
    assert batch_sizes(6) == (1, 2, 4, 6)
    assert batch_sizes(8) == (1, 2, 4, 8)


def test_new_settings_compile_nothing(lm):
    engine = lm.engine(max_batch_size=2)
    run(engine, requests()[:3])
    before = set(engine._slots.programs.programs)
    again = [
        EngineRequest(
            np.array([2, 8], "int32"),
            max_new_tokens=9,
            temperature=0.3,
            seed=99,
            top_k=7,
            top_p=0.5,
            stop_token_ids=(9, 8),
        )
    ]
    run(engine, again)
    assert set(engine._slots.programs.programs) == before
