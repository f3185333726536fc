"""KerasHub's samplers and custom subclasses of its base class, in `compile`."""

import json

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_gemma import samplers as public
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.generation import samplers
from keras_gemma.generation.samplers.borrowed import BorrowedSampler
from tests.models import compile_lm, make_backbone

PROMPTS = [[2, 9, 31], [2, 400, 3, 17, 60]]
NEW = 8


@pytest.fixture(scope="module")
def lm():
    return GemmaCausalLM(make_backbone())


def generate(lm, sampler, seed=None):
    compile_lm(lm, sampler=sampler)
    return lm.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=None, seed=seed)


def new_tokens(rows):
    return [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]


@keras.saving.register_keras_serializable(package="tests")
class Forbidding(keras_hub.samplers.Sampler):
    """Greedy decoding without some tokens, as in KerasHub's guide."""

    def __init__(self, forbidden_tokens, **kwargs):
        super().__init__(**kwargs)
        self.forbidden_tokens = forbidden_tokens

    def get_next_token(self, probabilities):
        batch_size, _ = ops.shape(probabilities)
        for id in self.forbidden_tokens:
            update = ops.zeros((batch_size, 1))
            probabilities = ops.slice_update(probabilities, (0, id), update)
        return ops.argmax(probabilities, axis=-1)

    def get_config(self):
        return {**super().get_config(), "forbidden_tokens": self.forbidden_tokens}


class Drawing(keras_hub.samplers.Sampler):
    """Sampler with a state, a Keras seed generator."""

    def __init__(self, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(seed)

    def get_next_token(self, probabilities):
        logits = ops.log(probabilities)
        return keras.random.categorical(logits, 1, seed=self.generator, dtype="int32")[:, 0]


class Sharpened(keras_hub.samplers.Sampler):
    """Uses `self.temperature` as a rank: chooses the k-th most likely token."""

    def get_next_token(self, probabilities):
        rank = int(self.temperature)
        return ops.top_k(probabilities, rank)[1][:, -1]


class Recording(keras_hub.samplers.Sampler):
    def get_next_token(self, probabilities):
        self.received = ops.convert_to_numpy(probabilities)
        return ops.argmax(probabilities, axis=-1)


def test_custom_sampler_of_keras_ops(lm):
    greedy = generate(lm, "greedy")
    assert generate(lm, Forbidding([])) == greedy
    assert generate(lm, keras_hub.samplers.GreedySampler()) == greedy
    forbidden = sorted({id for row in new_tokens(greedy) for id in row})
    allowed = generate(lm, Forbidding(forbidden))
    assert not {id for row in new_tokens(allowed) for id in row} & set(forbidden)


def test_seed_generator_advances_within_and_between_calls(lm):
    sampler = Drawing(seed=1, temperature=3.0)
    compile_lm(lm, sampler=sampler)
    first, second = (
        lm.generate([[2, 9, 31]] * 3, max_new_tokens=NEW, stop_token_ids=None) for _ in range(2)
    )
    assert first != second
    assert len({tuple(row) for row in first}) == 3
    assert len({id for row in first for id in row[3:]}) > 3
    # The same seed repeats the texts from the first call on.
    compile_lm(lm, sampler=Drawing(seed=1, temperature=3.0))
    assert lm.generate([[2, 9, 31]] * 3, max_new_tokens=NEW, stop_token_ids=None) == first


def test_calls_with_the_same_seed_are_equal(lm):
    sampler = Drawing(temperature=3.0)
    first = generate(lm, sampler, seed=5)
    assert generate(lm, sampler, seed=5) == first
    assert generate(lm, sampler, seed=6) != first
    assert generate(lm, Drawing(seed=1, temperature=3.0), seed=5) == first
    assert generate(lm, sampler, seed=-1) == generate(lm, sampler, seed=2**32 - 1)


def test_custom_sampler_that_uses_the_temperature(lm):
    assert generate(lm, Sharpened(temperature=1.0)) == generate(lm, "greedy")
    assert generate(lm, Sharpened(temperature=2.0)) != generate(lm, "greedy")


def test_probabilities_equal_keras_hub():
    logits = np.array([[1.0, 3.0, -2.0], [0.0, 0.5, 0.2]], "float32")
    for temperature in (1.0, 0.5, 3):
        lender = Recording(temperature=temperature)
        sampler = samplers.get(lender)
        sampler.choose_next(ops.convert_to_tensor(logits), sampler.init(2))
        expected = ops.convert_to_numpy(lender.compute_probabilities(logits))
        np.testing.assert_allclose(lender.received, expected, rtol=1e-5)


def test_temperature_may_change_after_compile(lm):
    lender = keras_hub.samplers.RandomSampler(seed=1, temperature=100.0)
    assert generate(lm, lender) != generate(lm, "greedy")
    lender.temperature = 1e-4
    assert lm.sampler.temperature == 1.0
    assert generate(lm, lender) == generate(lm, "greedy")


@pytest.mark.parametrize(
    "sampler",
    [
        keras_hub.samplers.RandomSampler(seed=1, temperature=2.0),
        keras_hub.samplers.TopKSampler(5, seed=1, temperature=2.0),
        keras_hub.samplers.TopPSampler(0.9, k=20, seed=1, temperature=2.0),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_keras_hub_samplers(lm, sampler):
    first, second = (generate(lm, sampler) for _ in range(2))
    assert first != second


def test_top_k_of_keras_hub_keeps_k(lm):
    assert generate(lm, keras_hub.samplers.TopKSampler(1)) == generate(lm, "greedy")


def test_same_sampler_is_not_recompiled(lm):
    sampler = Drawing(seed=1)
    generate(lm, sampler)
    programs = dict(lm.programs.programs)
    generate(lm, sampler)
    assert lm.programs.programs == programs


@pytest.mark.parametrize(
    "sampler",
    [Forbidding([3, 5], temperature=0.5), keras_hub.samplers.TopKSampler(7, seed=2)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_compile_config_contains_the_sampler(lm, sampler):
    compile_lm(lm, sampler=sampler)
    config = json.loads(json.dumps(lm.get_compile_config()))
    lm.compile()
    lm.compile_from_config(config)
    assert isinstance(lm.sampler, BorrowedSampler)
    assert type(lm.sampler.lender) is type(sampler)
    assert lm.sampler.lender.get_config() == sampler.get_config()
    assert lm.sampler.temperature == sampler.temperature


def test_saved_model_contains_the_sampler(lm, tmp_path):
    compile_lm(lm, sampler=Forbidding([3, 5]))
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert loaded.sampler.lender.forbidden_tokens == [3, 5]


def test_serialize_and_deserialize():
    for sampler in (public.TopKSampler(k=3, seed=1), public.GreedySampler()):
        config = json.loads(json.dumps(public.serialize(sampler)))
        assert public.deserialize(config) == sampler
    lender = Forbidding([1])
    assert public.deserialize(public.serialize(lender)).lender.forbidden_tokens == [1]
    theirs = keras_hub.samplers.serialize(keras_hub.samplers.TopKSampler(4))
    assert public.deserialize(theirs).lender.k == 4
    assert public.deserialize("top_p") == public.TopPSampler()
    with pytest.raises(ValueError, match="'best'"):
        public.deserialize("best")


class Capping(keras_hub.samplers.GreedySampler):
    def compute_probabilities(self, logits):
        return super().compute_probabilities(ops.minimum(logits, 1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (keras_hub.samplers.Sampler, "Sampler does not override get_next_token"),
        (Capping, "Capping overrides compute_probabilities"),
    ],
)
def test_samplers_with_a_custom_loop_are_refused(lm, make, message):
    compile_lm(lm, sampler="top_k")
    with pytest.raises(TypeError, match=rf"`sampler` must override.*{message}.*such as 'greedy'"):
        lm.compile(sampler=make())
    assert lm.sampler == samplers.TopKSampler()


def test_temperature_out_of_range():
    with pytest.raises(ValueError, match="temperature=-1"):
        samplers.get(Sharpened(temperature=-1))
