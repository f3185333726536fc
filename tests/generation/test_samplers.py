"""Samplers against closed-form distributions."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma import samplers as public
from keras_gemma.generation import samplers
from keras_gemma.generation.samplers import (
    GreedySampler,
    MinPSampler,
    RandomSampler,
    Sampler,
    TopKSampler,
    TopPSampler,
    random,
)
from keras_gemma.generation.samplers.override import override

P = np.array([0.05, 0.3, 0.02, 0.12, 0.2, 0.01, 0.15, 0.03, 0.08, 0.04])
"""Descending: 0.3, 0.2, 0.15, 0.12, 0.08, ..."""

TIED = np.array([0.3, 0.1, 0.2, 0.1, 0.1, 0.05, 0.05, 0.04, 0.03, 0.03])
DRAWS = 4000


@functools.cache
def compiled(structure):
    """Returns the program of all samplers with this `structure`; settings are arguments."""
    if structure == "greedy":
        return backend.compile(GreedySampler().choose_next)
    _, *names = structure
    return backend.compile(RandomSampler(**dict.fromkeys(names, 1)).choose_next)


def draw(sampler, probabilities=P, rows=DRAWS, seed=11):
    logits = np.tile(np.log(probabilities), (rows, 1)).astype("float32")
    structure = sampler.structure()
    program = sampler.choose_next if structure is sampler else compiled(structure)
    ids, _ = program(ops.convert_to_tensor(logits), sampler.init(rows, seed))
    return ops.convert_to_numpy(ids)


def restricted(probabilities, ids):
    """Returns the distribution of the tokens `ids` only."""
    rest = np.zeros_like(probabilities)
    rest[ids] = probabilities[ids]
    return rest / rest.sum()


def tempered(temperature):
    powers = P ** (1 / temperature)
    return powers / powers.sum()


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (RandomSampler(), P),
        (RandomSampler(temperature=2.0), tempered(2.0)),
        (RandomSampler(temperature=0.5), tempered(0.5)),
        (TopKSampler(k=3), restricted(P, [1, 4, 6])),
        (TopKSampler(k=1), restricted(P, [1])),
        (TopKSampler(k=50), P),
        (TopKSampler(k=3, temperature=2.0), restricted(tempered(2.0), [1, 4, 6])),
        (TopPSampler(p=0.6), restricted(P, [1, 4, 6])),
        (TopPSampler(p=0.45), restricted(P, [1, 4])),
        (TopPSampler(p=1.0), P),
        (TopPSampler(p=1e-9), restricted(P, [1])),
        # The nucleus of the tempered distribution: 0.19, 0.16, 0.14, 0.12, ...
        (TopPSampler(p=0.5, temperature=2.0), restricted(tempered(2.0), [1, 4, 6, 3])),
        # The probabilities of the top three are 0.46, 0.31 and 0.23; the first two reach p.
        (TopPSampler(p=0.7, k=3), restricted(P, [1, 4])),
        (TopPSampler(p=1.0, k=3), restricted(P, [1, 4, 6])),
        (MinPSampler(min_p=0.5), restricted(P, [1, 4, 6])),
        (MinPSampler(min_p=1.0), restricted(P, [1])),
        # Tempered probabilities are square roots: those of 0.3 and 0.08 are 0.55 and 0.28.
        (MinPSampler(min_p=0.5, temperature=2.0), restricted(tempered(2.0), [1, 4, 6, 3, 8])),
        (RandomSampler(top_k=4, min_p=0.5), restricted(P, [1, 4, 6])),
        (RandomSampler(top_k=4, top_p=0.5), restricted(P, [1, 4])),
    ],
    ids=str,
)
def test_distribution(sampler, expected):
    counts = np.bincount(draw(sampler), minlength=len(P))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    deviations = counts[possible] - DRAWS * expected[possible]
    # Chi-squared with at most 9 degrees of freedom exceeds 30 with p < 0.0005. The seed is fixed.
    assert (deviations**2 / (DRAWS * expected[possible])).sum() < 30


@pytest.mark.parametrize("sampler", [TopKSampler(k=3), TopPSampler(p=0.55)], ids=repr)
def test_ties_of_the_last_token_are_kept(sampler):
    assert set(draw(sampler, TIED)) == {0, 1, 2, 3, 4}


def test_ties_of_the_first_token_are_kept():
    assert set(draw(TopPSampler(p=0.1), np.array([0.4, 0.4, 0.2]))) == {0, 1}


CLASSES = [RandomSampler, TopKSampler, TopPSampler, MinPSampler]


@pytest.mark.parametrize("kind", CLASSES)
def test_temperature_0_is_greedy(kind):
    assert set(draw(kind(temperature=0))) == {1}
    # Also if two are equal, or nearly equal.
    near = np.array([0.2, 0.3, 0.3 + 3e-7, 0.2])
    assert set(draw(kind(temperature=0), near)) == set(draw(GreedySampler(), near))
    tied = np.array([0.1, 0.3, 0.3, 0.3])
    assert set(draw(kind(temperature=0), tied)) == {1}


def test_greedy_ignores_temperature_and_seed():
    assert set(draw(GreedySampler(temperature=100.0, seed=3))) == {1}


def test_extreme_logits():
    logits = np.array([[-1e30, 80.0, 79.0, -np.inf], [1e30, 0.0, 0.0, 0.0]], "float32")
    for sampler in (GreedySampler(), *(kind() for kind in CLASSES)):
        ids, _ = sampler.choose_next(ops.convert_to_tensor(logits), sampler.init(2, 0))
        first, second = ops.convert_to_numpy(ids)
        assert first in (1, 2) and second == 0


def test_seeds():
    sampler = RandomSampler(seed=3)

    def rows(seed=None, sampler=sampler):
        return draw(sampler, rows=50, seed=seed).tolist()

    assert rows() == rows()
    assert rows() == rows(seed=3)
    assert rows() != rows(seed=4)
    assert rows(seed=2**40 + 5) == rows(seed=5)
    assert rows(seed=-1) == rows(seed=2**32 - 1)
    assert rows(seed=np.int64(3)) == rows()


def test_without_a_seed_calls_differ_but_programs_are_repeatable():
    sampler = RandomSampler()
    keras.utils.set_random_seed(5)
    first, second = (draw(sampler, rows=50, seed=None).tolist() for _ in range(2))
    assert first != second
    keras.utils.set_random_seed(5)
    assert draw(sampler, rows=50, seed=None).tolist() == first


def test_draws_depend_on_the_step_and_not_on_the_batch():
    sampler = RandomSampler(seed=1)
    program = backend.compile(sampler.choose_next)
    logits = ops.convert_to_tensor(np.tile(np.log(P), (50, 1)).astype("float32"))
    first, state = program(logits, sampler.init(50))
    second, _ = program(logits, state)
    assert ops.convert_to_numpy(first).tolist() != ops.convert_to_numpy(second).tolist()
    few, _ = program(logits[:3], sampler.init(3))
    assert ops.convert_to_numpy(few).tolist() == ops.convert_to_numpy(first)[:3].tolist()


def test_recorded_draws():
    # Recorded on JAX. All backends draw the same tokens.
    assert draw(RandomSampler(), rows=24, seed=2026).tolist() == RECORDED


RECORDED = [1, 8, 3, 1, 7, 8, 4, 4, 6, 4, 4, 3, 6, 8, 1, 4, 3, 3, 3, 7, 6, 1, 1, 1]


class Second(Sampler):
    """Custom sampler as in KerasHub: one method and a constructor."""

    def __init__(self, rank, **kwargs):
        super().__init__(**kwargs)
        self.rank = rank

    def get_next_token(self, probabilities):
        return ops.top_k(probabilities, self.rank)[1][:, -1]


class MostLikely(Sampler):
    def get_next_token(self, probabilities):
        self.received = ops.convert_to_numpy(probabilities)
        return ops.argmax(probabilities, axis=-1)


def test_custom_sampler():
    assert set(draw(Second(2))) == {4}
    assert set(draw(Second(rank=3, temperature=0.7))) == {6}
    sampler = MostLikely(temperature=2.0)
    assert set(draw(sampler)) == {1}
    np.testing.assert_allclose(sampler.received[0], tempered(2.0), atol=1e-6)
    with pytest.raises(TypeError, match="Override"):
        draw(Sampler())


def test_positional_arguments_equal_keras_hub():
    assert TopKSampler(5, 42) == TopKSampler(k=5, seed=42)
    assert TopPSampler(0.2, 4, 42) == TopPSampler(p=0.2, k=4, seed=42)
    assert RandomSampler(42) == RandomSampler(seed=42)
    assert TopKSampler().k == 5 and TopPSampler().p == 0.1 and TopPSampler().k is None


def test_settings_per_row():
    """Each row is drawn as if the whole batch had its settings."""
    temperatures, ks, ps, seeds = [0.5, 1.0, 3.0], [2, 9, 4], [0.9, 0.5, 1.0], [1, 2, 1]
    logits = ops.convert_to_tensor(np.tile(np.log(P), (3, 1)).astype("float32"))
    mixed = RandomSampler(temperature=temperatures, top_k=ks, top_p=ps)
    for _ in range(20):
        seeds = [seed + 5 for seed in seeds]
        together, _ = mixed.choose_next(logits, mixed.init(3, seeds, row_keys=[0, 0, 1]))
        for i in range(3):
            one = RandomSampler(temperature=temperatures[i], top_k=ks[i], top_p=ps[i])
            single, _ = one.choose_next(logits[:1], one.init(1, seeds[i], row_keys=[int(i == 2)]))
            assert int(single[0]) == int(together[i])
    # Copies of a prompt are adjacent.
    state = mixed.init(6)
    np.testing.assert_array_equal(ops.convert_to_numpy(state["top_k"]), [2, 2, 9, 9, 4, 4])
    with pytest.raises(ValueError, match="`temperature` must be one value, or one for each of the"):
        mixed.init(4)


def test_filters_are_exact():
    """Filters equal a sort, on a vocabulary with many ties and small probabilities."""
    logits = np.round(np.random.default_rng(0).normal(0, 4, (5, 300)), 1).astype("float32")
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    ordered = -np.sort(-weights, axis=-1)
    k, p = (
        np.array([1, 7, 100, 299, 300], "int32"),
        np.array([0.1, 0.5, 0.9, 0.99, 0.999], "float32"),
    )
    filtered = random.keep_top_k(ops.convert_to_tensor(logits), ops.convert_to_tensor(k))
    expected = weights >= ordered[np.arange(5), k - 1][:, None]
    np.testing.assert_array_equal(ops.convert_to_numpy(filtered) > -1e30, expected)
    filtered = random.keep_top_p(ops.convert_to_tensor(logits), ops.convert_to_tensor(p))
    sums = np.cumsum(ordered.astype("float64"), axis=-1)
    count = (sums < (p * sums[:, -1])[:, None]).sum(-1)
    expected = weights >= ordered[np.arange(5), count][:, None]
    np.testing.assert_array_equal(ops.convert_to_numpy(filtered) > -1e30, expected)


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_candidates_give_the_same_draws(rounded, monkeypatch):
    """A draw from the most likely tokens equals one from all tokens, row by row."""
    generator = np.random.default_rng(1)
    rows = 512
    logits = generator.normal(0, 2, (rows, 300)).astype("float32")
    if rounded:
        logits = np.round(logits)
    sampler = RandomSampler(
        temperature=generator.choice([0.0, 0.5, 1.0, 3.0], rows).tolist(),
        top_k=generator.choice([1, 5, 30, 90, 300], rows).tolist(),
        top_p=generator.choice([0.1, 0.7, 0.95, 1.0], rows).tolist(),
        min_p=generator.choice([1e-9, 0.1, 1.0], rows).tolist(),
    )
    all_drawn = []
    assert {1, 30, 90, 300} <= set(sampler.top_k)
    monkeypatch.setattr(random, "NUM_CANDIDATES", 32)
    for names in (("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p"), random.FILTERS):
        state = sampler.init(rows, seed=len(names))
        for name in set(random.FILTERS) - set(names):
            del state[name]
        tensor = ops.convert_to_tensor(logits)
        expected = random.draw(random.limit(tensor, state), state)
        drawn = random.draw_limited(tensor, state)
        np.testing.assert_array_equal(ops.convert_to_numpy(drawn), ops.convert_to_numpy(expected))
        all_drawn.append(ops.convert_to_numpy(drawn))
    assert len({tuple(drawn) for drawn in all_drawn}) > 1

    def fail(*args):
        raise AssertionError("looked at all tokens")

    if keras.config.backend() == "torch" and not rounded:  # others trace both branches
        monkeypatch.setattr(random, "limit", fail)
        few = RandomSampler(top_k=9, top_p=0.9, seed=3)
        few.choose_next(ops.convert_to_tensor(logits), few.init(rows))


def test_override():
    assert override(TopKSampler(5, seed=1), {}) == TopKSampler(5, seed=1)
    assert override(GreedySampler(), {"top_k": 3}) == RandomSampler(top_k=3)
    changed = override(TopKSampler(5, seed=1, temperature=2.0), {"top_p": 0.5, "temperature": 0.7})
    assert changed == RandomSampler(seed=1, temperature=0.7, top_k=5, top_p=0.5)
    assert override(TopPSampler(0.3), {"top_p": 0.9}) == RandomSampler(top_p=0.9)
    with pytest.raises(ValueError, match="`top_p` cannot be changed for Second"):
        override(Second(2), {"top_p": 0.5})
    with pytest.raises(ValueError, match="top_p=2"):
        override(GreedySampler(), {"top_p": 2})


def test_get():
    assert samplers.get("greedy") == GreedySampler()
    assert samplers.get("random") == RandomSampler()
    assert samplers.get("top_k") == TopKSampler()
    assert samplers.get("top_p") == TopPSampler()
    sampler = Second(2)
    assert samplers.get(sampler) is sampler
    with pytest.raises(ValueError, match=r"'greedy'.*'min_p', 'random', 'top_k', 'top_p'.*'best'"):
        samplers.get("best")
    for wrong in (None, 3, TopKSampler, lambda logits: logits):
        with pytest.raises(TypeError, match="`sampler` must be one of"):
            samplers.get(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RandomSampler(temperature=-0.1),
            r"in \[0, 1e9\), or a list .* temperature=-0.1",
        ),
        (lambda: GreedySampler(temperature=-1), "temperature=-1"),
        (lambda: Second(2, temperature=-1.0), "temperature=-1.0"),
        (lambda: RandomSampler(temperature=float("nan")), "temperature=nan"),
        (lambda: RandomSampler(temperature=float("inf")), "temperature=inf"),
        (lambda: RandomSampler(temperature="1"), "temperature='1'"),
        (lambda: RandomSampler(temperature=True), "temperature=True"),
        (lambda: RandomSampler(seed=1.5), "seed=1.5"),
        (lambda: RandomSampler(seed="1"), "seed='1'"),
        (lambda: TopKSampler(k=0), r"integer in \[1, 2147483647\], or a list .* k=0"),
        (lambda: TopKSampler(k=-2), "k=-2"),
        (lambda: TopKSampler(k=2.0), r"k=2\.0"),
        (lambda: TopKSampler(k=None), "k=None"),
        (lambda: TopKSampler(k=[]), r"k=\[\]"),
        (lambda: TopKSampler(k=[3, 0]), r"k=\[3, 0\]"),
        (lambda: RandomSampler(top_k=0), "top_k=0"),
        (lambda: RandomSampler(top_p=1.5), r"top_p=1\.5"),
        (lambda: MinPSampler(0.0), r"min_p=0\.0"),
        (lambda: TopPSampler(p=0), r"in \(0, 1\], or a list .* Received: p=0"),
        (lambda: TopPSampler(p=-0.5), r"p=-0\.5"),
        (lambda: TopPSampler(p=1.001), r"p=1\.001"),
        (lambda: TopPSampler(p=float("nan")), "p=nan"),
        (lambda: TopPSampler(p=0.5, k=0), "k=0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "sampler",
    [GreedySampler(), RandomSampler(seed=3), TopKSampler(2, 5, 0.5), TopPSampler(0.3, 9, 1, 2.0)],
    ids=repr,
)
def test_serialization(sampler):
    config = keras.saving.serialize_keras_object(sampler)
    assert keras.saving.deserialize_keras_object(config) == sampler
    assert type(sampler).from_config(sampler.get_config()) == sampler


def test_public_names():
    for name in (
        "GreedySampler",
        "MinPSampler",
        "RandomSampler",
        "Sampler",
        "TopKSampler",
        "TopPSampler",
    ):
        assert getattr(public, name) is getattr(samplers, name)
