"""Greedy text equals that of transformers with the same weights, on every backend.

NumPy draws the weights and PyTorch generates the expected text in each run, so backends that pass
also agree with each other.
"""

import pytest

from tests.models import make_lm
from tests.parity.pairs import load_into_transformers
from tests.storage.transformers_models import make_transformers_model

PROMPTS = [[2, 17], [2, 9, 31, 8, 300, 77, 5, 140, 11, 64, 23]]
NEW = 20

NAMES = ["gemma1_multi_query", "gemma1_wide_heads", "gemma2_grouped", "gemma2_27b_scale"]


@pytest.fixture(scope="module")
def quick():
    """Overrides the fixture: these programs are compiled with all optimizations."""


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text(name):
    import torch

    lm = make_lm(name)
    config = lm.backbone.config
    model = make_transformers_model(config.to_dict())
    arrays = {name: weight.numpy() for name, weight in lm.backbone.named_weights().items()}
    load_into_transformers(model, arrays, config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        text = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
        expected.append(text[0].tolist())
    assert len(expected[0]) == len(PROMPTS[0]) + NEW
    assert lm.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=None) == expected
