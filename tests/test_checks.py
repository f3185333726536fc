"""Argument checks: what they accept, and the wording of their errors."""

import numpy as np
import pytest

from keras_gemma import checks


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_positive_integers(value):
    checks.check_integer("rank", value)


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True, np.float32(2)])
def test_rejects_everything_else(value):
    with pytest.raises(ValueError, match=r"`rank` must be a positive integer\. Received: rank="):
        checks.check_integer("rank", value)


def test_integers_in_a_range():
    checks.check_integer("n", 0, minimum=0)
    checks.check_integer("n", 32, maximum=32)
    with pytest.raises(ValueError, match="`n` must be a non-negative integer"):
        checks.check_integer("n", -1, minimum=0)
    with pytest.raises(ValueError, match=r"from 1 to 32\. Pass fewer\. Received: n=33"):
        checks.check_integer("n", 33, maximum=32, advice="Pass fewer.")
    with pytest.raises(ValueError, match="an integer of at least 2"):
        checks.check_integer("n", 1, minimum=2)


def test_numbers_in_an_interval():
    checks.check_number("dropout", 0, "[0, 1)")
    checks.check_number("dropout", np.float32(0.5), "[0, 1)")
    for value in (1, 1.0, -0.1, 10**400, float("nan"), "0", None, True):
        with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\)\. Received: dropout="):
            checks.check_number("dropout", value, "[0, 1)")


def test_numbers_with_one_limit():
    checks.check_number("temperature", 0.1, "(0, inf)")
    with pytest.raises(ValueError, match="a finite number greater than 0"):
        checks.check_number("temperature", 0, "(0, inf)")
    with pytest.raises(ValueError, match="a finite number at least 0"):
        checks.check_number("penalty", -1, "[0, inf)")
    with pytest.raises(ValueError, match="must be a finite number"):
        checks.check_number("alpha", float("inf"))


def test_lists_of_numbers():
    for value in (0.5, 1, [0.5, 1.0], (1,), np.array([0.1, 0.2]), np.array(0.3), np.float32(0.5)):
        checks.check_numbers("top_p", value, "(0, 1]")
    for value in ([], [0.5, 0], np.array(2.0), [[0.5]], "0.5", None, [True], np.zeros((1, 2))):
        with pytest.raises(
            ValueError, match=r"`top_p` must be in \(0, 1\], or a list with one for"
        ):
            checks.check_numbers("top_p", value, "(0, 1]")
    checks.check_numbers("top_k", np.array([1, 2]), "[1, inf)", whole=True)
    for value in (0, 1.5, [2, 1.0]):
        with pytest.raises(ValueError, match="`top_k` must be an integer at least 1, or a list"):
            checks.check_numbers("top_k", value, "[1, inf)", whole=True)


def test_argument_names():
    checks.check_argument_names("f", ["width"], ["width", "height"])
    with pytest.raises(TypeError, match=r"`f` has no argument `widht`\. Did you mean `width`\?"):
        checks.check_argument_names("f", ["widht"], ["width", "height"])
    with pytest.raises(ValueError, match=r"`f` has no argument `x`\. Valid: width, height\."):
        checks.check_argument_names("f", ["x"], ["width", "height"], ValueError)


def test_bools():
    checks.check_bool("shuffle", False)
    with pytest.raises(ValueError, match=r"`shuffle` must be True or False\. Received: shuffle=1"):
        checks.check_bool("shuffle", 1)


def test_choices():
    checks.check_one_of("dtype", None, ("float32", None))
    with pytest.raises(ValueError, match=r"`dtype` must be one of 'float32', 'bfloat16'\."):
        checks.check_one_of("dtype", "int3", ("float32", "bfloat16"))
