"""Random bits against published vectors and against JAX."""

import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.generation.request import Request
from keras_gemma.generation.samplers import RandomSampler, noise
from keras_gemma.generation.samplers.noise import gumbel, hash_ids, threefry


def words(*values):
    return tuple(ops.convert_to_tensor(np.array(v, "uint32").view("int32")) for v in values)


def bits(key, counter):
    return [ops.convert_to_numpy(x).view("uint32") for x in threefry(key, counter)]


def test_published_vectors():
    # Random123's known answers for threefry2x32 with 20 rounds.
    vectors = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, expected in vectors:
        result = bits(words(*[[k] for k in key]), words(*[[c] for c in counter]))
        assert [int(x[0]) for x in result] == list(expected)


def test_bits_equal_jax():
    from jax.extend.random import threefry_2x32

    random = np.random.default_rng(0)
    key = random.integers(0, 2**32, 2, dtype="uint32")
    counter = random.integers(0, 2**32, 2000, dtype="uint32")
    expected = np.asarray(threefry_2x32(key, counter)).reshape(2, 1000)
    np.testing.assert_array_equal(bits(words(*key), words(*counter.reshape(2, 1000))), expected)


def test_gumbel_noise():
    tokens = ops.arange(5000, dtype="int32")[None]
    program = backend.compile(lambda *args: gumbel(*args, tokens))

    def noise_of(seed, rows, step):
        seeds = np.broadcast_to(seed, np.shape(rows))
        arguments = (ops.convert_to_tensor(x, dtype="int32") for x in (seeds, rows, step))
        return ops.convert_to_numpy(program(*arguments))

    rows, step = np.arange(4), np.zeros(4)
    noise = noise_of(7, rows, step)
    assert noise.shape == (4, 5000) and noise.dtype == "float32"
    assert np.isfinite(noise).all()
    # The mean is Euler's constant, the variance pi^2 / 6; bounds of five standard errors.
    assert abs(noise.mean() - 0.5772) < 0.05
    assert abs(noise.var() - np.pi**2 / 6) < 0.15
    # Different rows, steps and seeds have independent noise.
    later = noise_of(7, rows, step + 1)
    other = noise_of(8, rows, step)
    everything = np.concatenate([noise, later, other])
    correlations = np.corrcoef(everything) - np.eye(12)
    assert np.abs(correlations).max() < 0.08
    # The noise of a row does not depend on the batch.
    single = noise_of(7, rows[2:3], step[2:3])
    np.testing.assert_allclose(single[0], noise[2], rtol=1e-6)


def test_bits_of_tokens():
    """Against the definition of lowbias32 in unsigned arithmetic."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    key, tokens = (0xDEADBEEF, 0xFFFFFFF0), [0, 1, 77, 262_143]
    expected = [mix((mix((t * 0x9E3779B1 + key[0]) % 2**32) + key[1]) % 2**32) for t in tokens]
    bits = noise.token_bits(words([[key[0]]], [[key[1]]]), words([tokens])[0])
    assert ops.convert_to_numpy(bits).view("uint32").tolist() == [expected]


def test_bits_of_tokens_are_uniform_and_independent():
    keys = words(*np.random.default_rng(0).integers(0, 2**32, (2, 64, 1)))
    tokens = ops.arange(1 << 14, dtype="int32")[None]
    bits = ops.convert_to_numpy(noise.token_bits(keys, tokens)).view("uint32")
    assert len(np.unique(bits)) > 0.999 * bits.size
    for shift in (0, 12, 24):
        counts = np.bincount((bits >> shift & 255).ravel(), minlength=256)
        expected = bits.size / 256
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_squared - 255) < 5 * np.sqrt(2 * 255)
    numbers = bits / 2**32
    correlations = np.corrcoef(numbers) - np.eye(64)
    assert np.abs(correlations).max() < 5 / np.sqrt(1 << 14)
    shifted = np.corrcoef(numbers[:, 1:].ravel(), numbers[:, :-1].ravel())[0, 1]
    assert abs(shifted) < 5 / np.sqrt(bits.size)


def test_drawn_tokens_have_their_probabilities():
    probabilities = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    rows = 4096
    seeds, keys, step = (ops.zeros(rows, "int32"), ops.arange(rows, dtype="int32"), 0)
    tokens = ops.arange(5, dtype="int32")[None]
    values = gumbel(seeds, keys, ops.zeros(rows, "int32") + step, tokens)
    ids = ops.convert_to_numpy(
        ops.argmax(values + ops.convert_to_tensor(np.log(probabilities).astype("float32")), -1)
    )
    counts = np.bincount(ids, minlength=5)
    expected = rows * probabilities
    assert ((counts - expected) ** 2 / expected).sum() < 25  # 4 degrees of freedom


def test_largest_noise_is_finite(monkeypatch):
    """Bits that are all ones give the largest noise."""
    ones = ops.convert_to_tensor(np.full((1, 3), -1, "int32"))
    monkeypatch.setattr(noise, "token_bits", lambda key, tokens: ones)
    zero = ops.zeros(1, dtype="int32")
    largest = ops.convert_to_numpy(noise.gumbel(zero, zero, zero, ops.zeros((1, 3), "int32")))
    np.testing.assert_allclose(largest, -np.log(2.0**-24), rtol=1e-3)


@pytest.mark.once
def test_hash_is_a_polynomial_of_the_ids():
    for ids in ([2], [0], [2, 0], [0, 2], [2, 255_999, 0, 7] * 3000):
        expected, factor = 0, 1
        for token in ids:
            factor = factor * 2654435761 % 2**32
            expected = (expected + (token + 1) * factor) % 2**32
        assert hash_ids(np.array(ids, "int32")) == expected


def row_keys(prompts, seed=None, sequences=1):
    prompts = [np.array(prompt, "int32") for prompt in prompts]
    counts = [1] * len(prompts)
    request = Request(prompts, counts, RandomSampler(seed=0), (), seed, sequences)
    return request.row_keys().tolist()


@pytest.mark.once
def test_rows_of_different_prompts_have_different_keys():
    prompts = [[2], [2, 0], [0, 2], [2, 9], [9, 2], [2, 9, 9]]
    keys = row_keys(prompts)
    assert len(set(keys)) == len(prompts)
    # The key of a prompt does not depend on the batch. Equal prompts count from it.
    assert [row_keys([prompt])[0] for prompt in prompts] == keys
    first, second, other = row_keys([[2, 9], [2, 9], [2]])
    assert (first, second, other) == (keys[3], keys[3] + 1, keys[0])
    assert row_keys([[2, 9]], sequences=2) == [first, second]
    assert row_keys([[2, 9], [2, 9]], [1, 2]) == [first, first]
