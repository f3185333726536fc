"""Greedy text equals that of transformers with the same weights, on every backend.

NumPy draws the weights and PyTorch generates the expected text in each run, so backends that pass
also agree with each other.
"""

import numpy as np
import pytest

from keras_gemma.storage.hugging_face.reader import tensor_specs
from tests.models import make_lm
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
    model = make_transformers_model(lm.backbone.config.to_dict())
    places = tensor_specs(lm.backbone.config)
    state = {
        places[key].name: torch.from_numpy(np.array(weight.numpy()))
        for key, weight in lm.backbone.named_weights().items()
    }
    problems = model.load_state_dict(state, strict=False)
    assert problems.unexpected_keys == []
    assert problems.missing_keys in ([], ["lm_head.weight"])  # tied
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
