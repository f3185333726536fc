"""Turns of the engine, with a model of a few lines: every order of events."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_gemma.generation.engine_job import Job
from keras_gemma.generation.engine_request import EngineRequest, QueueFullError
from keras_gemma.generation.scheduler import OLDEST_EVERY, TURNS_BEFORE_SHRINKING, Scheduler
from tests.generation.fake_model import FakeModel, tokens

SIZES = (1, 2, 4)


class Clock:
    """Clock that moves by a second at each look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def make(sizes=SIZES, steps=1, max_requests=100, max_tokens=1000):
    model = FakeModel()
    return Scheduler(model, sizes, max_requests, max_tokens, steps, Clock()), model


def request(first=1, length=3, count=5, copies=1, stops=()):
    return EngineRequest(
        np.full(length, first, "int32"),
        max_new_tokens=count,
        num_return_sequences=copies,
        stop_token_ids=stops,
        seed=0,
    )


def add(scheduler, request):
    """Adds a request. Returns its job, and the list that gets its outputs."""
    outputs = []
    job = Job(request, outputs.append, scheduler.clock())
    scheduler.add(job)
    return job, outputs


def run(scheduler):
    turns = 0
    while scheduler.has_work:
        scheduler.turn()
        turns += 1
        assert turns < 1000
    return turns


def ids_of(outputs, index=0):
    return [id for output in outputs if output.index == index for id in output.ids]


def reasons_of(outputs):
    return [output.finish_reason for output in outputs if output.finish_reason]


EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(1, 20),  # first token
            st.integers(1, 12),  # length of the prompt
            st.integers(1, 8),  # new tokens
            st.integers(1, 3),  # copies
        ),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.integers(0, 2)),
        st.tuples(st.just("fail"), st.sampled_from(["chunk", "insert", "decode"])),
        st.tuples(st.just("turn"), st.integers(1, 4)),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=200)
@given(EVENTS, st.integers(1, 3), st.sampled_from([(1,), (3,), SIZES]))
def test_every_order_of_events(events, steps, sizes):
    scheduler, model = make(sizes, steps)
    jobs = []
    cancelled, failing = set(), False
    for kind, *values in events:
        if kind == "add":
            first, length, count, copies = values
            jobs.append(add(scheduler, request(first, length, count, copies, stops=(5, 40, 77))))
        elif kind == "cancel" and jobs:
            job, _ = jobs[values[0] % len(jobs)]
            sequence = job.sequences[values[1] % len(job.sequences)]
            sequence.is_cancelled = True
            cancelled.add((job, sequence.index))
        elif kind == "fail":
            model.failing[values[0]], failing = 0, True
        elif kind == "turn":
            for _ in range(values[0]):
                scheduler.turn()
    run(scheduler)
    assert not any(scheduler.slots) and not scheduler.queue and not scheduler.reading
    assert scheduler.update_stats().slots_used == 0
    for job, outputs in jobs:
        for sequence in job.sequences:
            mine = [output for output in outputs if output.index == sequence.index]
            (reason,) = reasons_of(mine)
            assert mine[-1].finish_reason == reason  # nothing after the end
            expected = tokens(job.request, sequence.index)
            ids = ids_of(mine, sequence.index)
            if reason == "cancelled":
                assert (job, sequence.index) in cancelled
            if reason == "error":
                assert failing and "failed" in str(mine[-1].error)
            if reason in ("cancelled", "error"):
                assert ids == expected[: len(ids)]
            else:
                assert ids == expected
                assert reason == ("stop" if ids[-1] in job.request.stop_token_ids else "length")


def test_requests_are_decoded_together():
    scheduler, _ = make((4,))
    outputs = [add(scheduler, request(first, count=10))[1] for first in range(4)]
    turns = run(scheduler)
    assert turns == 12  # one prompt is read per turn, and its first turn gives two tokens
    assert [len(ids_of(o)) for o in outputs] == [10] * 4


def test_a_free_slot_is_taken_at_once():
    scheduler, _ = make((2,))
    jobs = [add(scheduler, request(first, count=3))[0] for first in range(4)]
    run(scheduler)
    starts = [job.timings.prefill_start for job in jobs]
    finishes = [job.timings.finish for job in jobs]
    assert starts == sorted(starts)
    assert starts[2] > finishes[0]
    assert starts[2] < finishes[1] + 3
    for job in jobs:
        times = job.timings
        assert times.arrival < times.prefill_start < times.first_token <= times.finish


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler, model = make((2,))
    add(scheduler, request(1, length=40))
    _, short = add(scheduler, request(2, length=4))
    scheduler.turn()
    scheduler.turn()
    assert short  # after one chunk of the long prompt
    run(scheduler)
    assert [r.prompt[0] for r in model.chunks].count(1) == 10


def test_a_long_prompt_makes_progress_among_short_ones():
    scheduler, _ = make((2,))
    _, long = add(scheduler, request(1, length=16, count=1))
    for _ in range(20):
        add(scheduler, request(2, length=4, count=1))
    for _ in range(4 * OLDEST_EVERY):
        scheduler.turn()
    assert long and scheduler.queue


def test_decoding_goes_on_while_a_long_prompt_is_read():
    scheduler, _ = make((2,))
    _, first = add(scheduler, request(1, count=30))
    scheduler.turn()
    add(scheduler, request(2, length=40))
    for n in range(2, 8):
        before = len(ids_of(first))
        scheduler.turn()
        assert len(ids_of(first)) == before + 1, n


def test_copies_share_one_prefill():
    scheduler, model = make((4,))
    job, outputs = add(scheduler, request(3, length=8, copies=6))
    run(scheduler)
    assert len(model.chunks) == 2
    assert [ids_of(outputs, i) for i in range(6)] == [tokens(job.request, i) for i in range(6)]


def test_cancelled_requests_free_their_slot_in_one_turn():
    scheduler, model = make((1,))
    running, outputs = add(scheduler, request(1, count=100))
    waiting, others = add(scheduler, request(2, count=100))
    scheduler.turn()
    assert scheduler.update_stats().num_waiting == 1
    for job in (running, waiting):
        job.sequences[0].is_cancelled = True
    scheduler.turn()
    assert reasons_of(outputs) == reasons_of(others) == ["cancelled"]
    assert not scheduler.has_work and not any(model.rows)
    assert scheduler.stats.num_cancelled == 2


def test_cancelled_while_its_prompt_is_read():
    scheduler, model = make((1,))
    job, outputs = add(scheduler, request(1, length=40))
    scheduler.turn()
    job.sequences[0].is_cancelled = True
    scheduler.turn()
    assert reasons_of(outputs) == ["cancelled"] and len(model.chunks) == 1


def test_an_error_of_a_chunk_ends_its_request_only():
    scheduler, model = make((2,))
    _, good = add(scheduler, request(1, count=20))
    scheduler.turn()
    _, bad = add(scheduler, request(2))
    model.failing["chunk"] = 0
    run(scheduler)
    assert reasons_of(bad) == ["error"] and reasons_of(good) == ["length"]
    assert scheduler.stats.num_restarts == 0 and scheduler.failures == 0


def test_an_error_of_a_step_ends_those_in_slots_and_serves_on(caplog):
    scheduler, model = make((2,))
    running = [add(scheduler, request(n, count=20))[1] for n in range(2)]
    for _ in range(4):
        scheduler.turn()
    _, after = add(scheduler, request(7))
    model.failing["decode"] = 0
    scheduler.turn()
    assert scheduler.failures == 1
    run(scheduler)
    assert [reasons_of(outputs) for outputs in running] == [["error"]] * 2
    assert ids_of(after) == tokens(request(7), 0)
    assert scheduler.stats.num_restarts == 1 and scheduler.failures == 0
    assert "decode failed" in caplog.text


@pytest.mark.parametrize("call", ["free", "resize"])
def test_errors_while_slots_change(call):
    """An error at any place of a turn ends those in the slots, and the next request is served."""
    scheduler, model = make()
    jobs = [add(scheduler, request(n, count=30 if n else 3)) for n in range(4)]
    for _ in range(6):
        scheduler.turn()
    if call == "free":
        jobs[1][0].sequences[0].is_cancelled = True
    else:
        for job, _ in jobs[2:]:
            job.sequences[0].is_cancelled = True
    model.failing[call] = 0
    run(scheduler)
    for _, outputs in jobs:
        assert len(reasons_of(outputs)) == 1
    assert "error" in reasons_of(jobs[1][1])
    assert model.num_drops == 1
    _, after = add(scheduler, request(7))
    run(scheduler)
    assert ids_of(after) == tokens(request(7), 0)


def test_an_error_of_the_first_step_after_a_failure_reaches_the_caller():
    scheduler, model = make()
    _, outputs = add(scheduler, request())
    model.failing = {"decode": 0, "clear": 0}
    with pytest.raises(RuntimeError, match="clear failed"):
        scheduler.turn()
    assert reasons_of(outputs) == ["error"]


def test_a_failed_insertion_ends_all_copies():
    scheduler, model = make()
    _, outputs = add(scheduler, request(copies=3))
    _, other = add(scheduler, request(5))
    model.failing["insert"] = 1
    run(scheduler)
    assert reasons_of(outputs) == ["error"] * 3
    assert reasons_of(other) == ["length"]


def test_failures_of_prompts_are_forgotten():
    """Prompts that are decoded in one step, as in benchmarks, never make a decode step."""
    scheduler, model = make()
    for _ in range(5):
        model.failing["chunk"] = 0
        add(scheduler, request())
        run(scheduler)
        add(scheduler, request(count=1))
        run(scheduler)
    assert scheduler.failures == 0


def test_failures_in_a_row_are_counted():
    scheduler, model = make((1,))
    for count in range(1, 4):
        add(scheduler, request())
        model.failing["decode"] = 0
        scheduler.turn()
        assert scheduler.failures == count
    add(scheduler, request())
    run(scheduler)
    assert scheduler.failures == 0


def test_the_batch_follows_the_load():
    scheduler, model = make()
    for first in range(4):
        add(scheduler, request(first, count=6))
    add(scheduler, request(9, count=60))
    run(scheduler)
    assert max(model.sizes) == 4
    assert model.sizes[-1] == 1
    assert model.sizes[-1 - TURNS_BEFORE_SHRINKING * 3] == 1
    assert len(scheduler.slots) == 1


def test_a_pinned_batch_has_one_size():
    scheduler, model = make((4,))
    add(scheduler, request(count=20))
    run(scheduler)
    assert set(model.sizes) == {4}


def test_several_steps_per_turn():
    scheduler, _ = make((2,), steps=4)
    _, outputs = add(scheduler, request(count=11))
    assert run(scheduler) == 3
    assert [len(output.ids) for output in outputs] == [1, 4, 4, 2]


def test_full_queue():
    scheduler, _ = make((1,), max_requests=2, max_tokens=10)

    def check(length, arrivals=()):
        scheduler.check_queue(Job(request(length=length), print, 0.0), list(arrivals))

    check(1000)  # an empty queue takes one of any length
    first, _ = add(scheduler, request(length=6))
    check(4)
    with pytest.raises(QueueFullError, match=r"1 requests with 6 prompt tokens"):
        check(5)
    with pytest.raises(QueueFullError, match=r"2 requests with 12 prompt tokens"):
        check(1, [first])
    add(scheduler, request(length=2))
    with pytest.raises(QueueFullError, match="Try again later"):
        check(1)


def test_fail_all():
    scheduler, _ = make((1,))
    outputs = [add(scheduler, request(n))[1] for n in range(3)]
    scheduler.turn()
    scheduler.fail_all(RuntimeError("gone"))
    assert [reasons_of(o) for o in outputs] == [["error"]] * 3
    assert not scheduler.has_work
