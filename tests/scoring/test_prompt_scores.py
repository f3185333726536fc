"""Scores of prompts, compared with the logits of the model."""

import numpy as np
import pytest

from keras_gemma.scoring import continuations
from keras_gemma.scoring.prompt_scores import PromptScorer, PromptScores
from tests.models import make_lm
from tests.scoring.texts import numpy


@pytest.mark.parametrize("name", ["gemma2_grouped", "gemma3"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_logits(name, count, monkeypatch):
    monkeypatch.setattr(continuations, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(continuations, "MAX_SCORED_LOGITS", 8 * 512)
    lm = make_lm(name)
    ids = np.random.default_rng(0).integers(3, 512, 37).astype("int32")
    parts = list(PromptScorer(lm.backbone).score_prompt(ids, count))
    assert len(parts) > 3  # so that other work can be done in between
    scores = PromptScores(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    logits = numpy(lm.score(token_ids=ids[None], scoring_mode="logits"))[0, :-1].astype("float64")
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    rows = np.arange(len(logprobs))
    np.testing.assert_allclose(scores.logprobs, logprobs[rows, ids[1:]], atol=1e-4)
    order = np.argsort(-logprobs, axis=-1)[:, :count]
    np.testing.assert_array_equal(scores.top_ids, order)
    np.testing.assert_allclose(
        scores.top_logprobs, np.take_along_axis(logprobs, order, axis=-1), atol=1e-4
    )
