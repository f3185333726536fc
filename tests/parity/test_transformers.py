"""Hidden states and logits of every variant, compared with transformers."""

import numpy as np
import pytest

from tests.configurations import CONFIGURATIONS
from tests.parity.pairs import (
    FULL,
    PADDED,
    TOLERANCE,
    largest_difference,
    make_ours,
    make_theirs,
    run_ours,
    run_theirs,
    typical_difference,
)

ROUNDINGS_PER_BLOCK = 16
"""Results of a block in bfloat16: 7 products, 4 norms, 2 sums, 2 rotations and a gate."""


@pytest.mark.parametrize("variant", CONFIGURATIONS)
@pytest.mark.parametrize("mask", [FULL, PADDED], ids=["full", "padded"])
def test_float32(variant: str, mask: np.ndarray):
    ours = run_ours(make_ours(CONFIGURATIONS[variant]), mask)
    theirs = run_theirs(make_theirs(CONFIGURATIONS[variant]), mask)
    for name in theirs:
        assert largest_difference(ours[name], theirs[name], mask) < TOLERANCE, name


@pytest.mark.parametrize("variant", CONFIGURATIONS)
def test_bfloat16(variant: str):
    configuration = CONFIGURATIONS[variant]
    exact, ours, theirs = [], [], []
    # With one set of weights, either side may be better by a third, so four sets are combined.
    for seed in range(4):
        exact.append(run_ours(make_ours(configuration, "float32", seed), FULL))
        ours.append(run_ours(make_ours(configuration, "bfloat16", seed), FULL))
        theirs.append(run_theirs(make_theirs(configuration, seed).bfloat16(), FULL))
    # Independent roundings of at most 2**-9 add up like a random walk. transformers also rounds
    # attention logits, and the softmax multiplies that error by their size, about 4.
    roundings = ROUNDINGS_PER_BLOCK * configuration["num_layers"]
    for name in ("hidden", "logits"):
        a, b, truth = (np.stack([run[name] for run in runs]) for runs in (ours, theirs, exact))
        assert typical_difference(a, b) < 4 * 2**-9 * roundings**0.5, name
        # transformers also rounds the angles, so our error must not be larger.
        assert typical_difference(a, truth) < 1.1 * typical_difference(b, truth), name


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("gemma2_grouped", {"attention_logit_soft_cap": None}),
        ("gemma2_grouped", {"final_logit_soft_cap": None}),
        ("gemma2_grouped", {"use_sliding_window_attention": False}),
        ("gemma2_grouped", {"sliding_window_size": 3}),
        ("gemma2_grouped", {"sliding_window_size": 5}),
        ("gemma2_27b_scale", {"query_head_dim_normalize": True}),
        ("gemma2_epsilon", {"layer_norm_epsilon": 1e-6}),
        ("vaultgemma", {"use_sliding_window_attention": False}),
        ("gemma3", {"sliding_window_pattern": 5}),
        ("gemma3", {"global_rope_wavelength": 10_000.0}),
        ("gemma3", {"local_rope_wavelength": 1_000_000.0}),
        ("gemma3_27b_scale", {"query_head_dim_normalize": True}),
        ("gemma3_27b_scale", {"global_rope_scaling_factor": 1.0}),
        ("gemma3_27b_scale", {"local_rope_scaling_factor": 8.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_constant_matters(variant: str, change: dict):
    """Without one of the constants, the result differs."""
    configuration = CONFIGURATIONS[variant]
    right = run_ours(make_ours(configuration), FULL)["logits"]
    wrong = run_ours(make_ours(configuration | change), FULL)["logits"]
    assert largest_difference(wrong, right, FULL) > 100 * TOLERANCE


def test_exact_gelu_differs():
    configuration = CONFIGURATIONS["gemma2_grouped"]
    ours = run_ours(make_ours(configuration), FULL)["logits"]
    exact_gelu = run_theirs(make_theirs(configuration, hidden_activation="gelu"), FULL)["logits"]
    assert largest_difference(ours, exact_gelu, FULL) > TOLERANCE


def test_gelu_of_gemma1_is_always_the_tanh_approximation():
    configuration = CONFIGURATIONS["gemma1_multi_query"]
    ours = run_ours(make_ours(configuration), FULL)["logits"]
    theirs = run_theirs(make_theirs(configuration, hidden_act="gelu"), FULL)["logits"]
    assert largest_difference(ours, theirs, FULL) < TOLERANCE


def test_padding_at_the_start_matters():
    """Only the mask hides padding at the start; causality would hide padding at the end."""
    model = make_ours(CONFIGURATIONS["gemma2_grouped"])
    mask = FULL.copy()
    mask[1, :3] = 0
    right, wrong = run_ours(model, mask)["logits"], run_ours(model, FULL)["logits"]
    assert largest_difference(wrong[1:], right[1:], mask[1:]) > 100 * TOLERANCE
    assert np.isfinite(right).all()
