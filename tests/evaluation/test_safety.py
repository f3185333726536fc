"""Shares of unsafe texts, with a function and with ShieldGemma as the judge."""

import json
import math
import statistics

import numpy as np
import pytest

from keras_gemma.evaluation import evaluate
from keras_gemma.evaluation.safety import (
    judge_generations,
    read_generations,
    shield_judge,
    write_generations,
)
from keras_gemma.shield_gemma import ShieldGemma
from tests.evaluation.conftest import COLORS, FakeLM

PROMPTS = ["a", "b", "b", "c", "é\n"]
COMPLETIONS = ["bad", "bad", "good", "good", "very bad"]


def judge(texts):
    return [0.5 * text.count("bad") + 0.1 for text in texts]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "texts.jsonl"
    write_generations(path, PROMPTS, COMPLETIONS)
    return path


@pytest.mark.once
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_share(path, batch_size):
    sizes = []

    def spy(texts):
        sizes.append(len(texts))
        return np.array(judge(texts))

    judgment = judge_generations(path, spy, threshold=0.6, batch_size=batch_size)
    assert judgment.scores == {"a": [0.6], "b": [0.6, 0.1], "c": [0.1], "é\n": [0.6]}
    shares = [1, 0.5, 0, 1]
    assert judgment.share == statistics.mean(shares)
    assert judgment.stderr == pytest.approx(statistics.stdev(shares) / 2)
    assert sum(sizes) == 5 and max(sizes) <= batch_size


@pytest.mark.once
def test_error_of_one_completion_per_prompt_is_binomial(tmp_path):
    write_generations(tmp_path / "x", map(str, range(50)), ["bad"] * 10 + ["good"] * 40)
    judgment = judge_generations(tmp_path / "x", judge)
    assert judgment.share == 0.2
    assert judgment.stderr == pytest.approx(math.sqrt(0.2 * 0.8 / 49))


@pytest.mark.once
def test_log_of_an_evaluation(data, tmp_path):
    evaluate(FakeLM(), "triviaqa:4", data=data, shots=0, output=tmp_path / "x", name="fake")
    (path,) = (tmp_path / "x/triviaqa").glob("samples_*.jsonl")
    texts = []
    judgment = judge_generations(path, lambda batch: texts.extend(batch) or [0.0] * len(batch))
    assert len(texts) == 4 and set(texts) <= set(COLORS)
    assert all("?" in prompt for prompt in judgment.scores)


@pytest.mark.once
def test_texts_with_line_separators(tmp_path):
    row = {"prompt": "a\u2028b", "completion": "c\x85d\x0ce\nf"}
    (tmp_path / "x").write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_generations(tmp_path / "x") == [tuple(row.values())]


@pytest.mark.once
def test_write_replaces_only_its_own_files_when_complete(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):
        write_generations(path, ["a", "b"], ["c"])
    assert path.read_bytes() == before
    write_generations(path, ["a"], ["c"])
    assert read_generations(path) == [("a", "c")]
    path.write_text("notes")
    for target in (path, path.parent):
        with pytest.raises(ValueError, match=r"`path` exists.*files of generations"):
            write_generations(target, ["a"], ["c"])
    assert path.read_text() == "notes"


@pytest.mark.once
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "line 2: expected a JSON object"),
        ('{"prompt": "a", "completion": 1}', "line 1: expected"),
        ('["a", "b"]', "line 1: expected"),
    ],
)
def test_damaged_files(tmp_path, text, message):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=message):
        judge_generations(tmp_path / "x", judge)


@pytest.mark.once
@pytest.mark.parametrize("scores", [[0.1], [[0.1]] * 5, [math.nan] * 5])
def test_bad_judges(path, scores):
    with pytest.raises(ValueError, match="`judge` must return one finite number per text"):
        judge_generations(path, lambda texts: scores)


def test_shield_gemma_is_a_judge(tmp_path):
    shield = ShieldGemma.from_preset("gemma_tiny_instruct_en", context_length=2048)
    write_generations(tmp_path / "x", ["a", "b"], COMPLETIONS[1:3])
    policies = ["No Harassment", "No Hate Speech"]
    judgment = judge_generations(tmp_path / "x", shield_judge(shield, policies))
    pairs = {"prompts": ["", ""], "responses": COMPLETIONS[1:3]}
    expected = np.maximum(*(shield.predict(pairs, [policy])[policy] for policy in policies))
    assert [*judgment.scores.values()] == [[pytest.approx(value, 1e-4)] for value in expected]
