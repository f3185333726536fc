"""Made-up benchmark data, and an LM of lm-eval that answers at once."""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

ANIMALS = ("owl", "crow", "lynx", "toad", "moth", "newt", "wolf", "hare")
COLORS = ("red", "blue", "green", "black", "white")


class FakeLM(LM):
    """LM whose answers depend only on the text. Answers batches of 4, and stores each.

    Args:
        fails_after: Number of requests after which it raises a KeyboardInterrupt.
    """

    def __init__(self, fails_after: int | None = None) -> None:
        super().__init__()
        self.fails_after = fails_after
        self.asked: list[tuple] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._batches("loglikelihood", requests, lambda text: (-(text % 997) / 100, False))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._batches("loglikelihood_rolling", requests, lambda text: -(text % 997) / 100)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._batches("generate_until", requests, lambda text: COLORS[text % len(COLORS)])

    def _batches(self, method: str, requests: list[Instance], answer) -> Iterator:
        answers = []
        for start in range(0, len(requests), 4):
            batch = requests[start : start + 4]
            if self.fails_after is not None and len(self.asked) + len(batch) > self.fails_after:
                raise KeyboardInterrupt
            self.asked += [request.args for request in batch]
            new = [answer(zlib.crc32(str(request.args).encode())) for request in batch]
            for request, one in zip(batch, new, strict=True):
                self.cache_hook.add_partial(method, request.args, one)
            answers += new
        return answers


class CountingLM(FakeLM):
    """LM that counts one token per request, and finds `long`, tasks with places of items, long."""

    def __init__(self, *long: tuple[str, int], fails_after: int | None = None) -> None:
        super().__init__(fails_after)
        self.long = long
        self.truncated: list[tuple[str, int]] = []
        self.report = lambda tokens: None

    def count_tokens(self, requests: list[Instance]) -> int:
        places = [(request.task_name, request.doc_id) for request in requests]
        self.truncated += [place for place in places if place in self.long]
        return len(requests)


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with 8 items per task, in the columns of the published data sets."""
    folder = tmp_path_factory.mktemp("benchmarks")
    questions = [
        {
            "question": f"Which color has the {animal}?",
            "choices": {"text": list(COLORS[:4]), "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i, animal in enumerate(ANIMALS)
    ]
    write(folder / "arc_easy/test.jsonl", questions)
    write(folder / "arc_challenge/test.jsonl", questions)
    write(folder / "arc_challenge/train.jsonl", questions)
    stories = [
        {
            "activity_label": "Painting",
            "ctx_a": f"A person paints the {animal}.",
            "ctx_b": "then the person",
            "endings": [f"adds a {color} line." for color in COLORS[:4]],
            "label": str(i % 4),
        }
        for i, animal in enumerate(ANIMALS)
    ]
    write(folder / "hellaswag/validation.jsonl", stories)
    write(folder / "hellaswag/train_part.jsonl", stories)
    exams = [
        {
            "subject": ("anatomy", "virology")[i % 2],
            "question": f"What is a {animal}?",
            "choices": list(COLORS[:4]),
            "answer": i % 4,
        }
        for i, animal in enumerate(ANIMALS)
    ]
    write(folder / "mmlu/test.jsonl", exams)
    write(folder / "mmlu/dev.jsonl", exams * 2)
    trivia = [
        {"question": f"Which color has the {animal}", "answer": {"aliases": list(COLORS[:2])}}
        for animal in ANIMALS
    ]
    write(folder / "triviaqa/validation.jsonl", trivia)
    write(folder / "triviaqa/fewshot_8.jsonl", trivia)
    exams = [
        {
            "task": ("lsat-ar", "sat-math")[i % 2],
            "query": f"Q: Which color has the {animal}? A: Among A through D, the answer is",
            "choices": [f"(A) {color}" for color in COLORS[:4]],
            "gold": [i % 4],
        }
        for i, animal in enumerate(ANIMALS)
    ]
    write(folder / "agieval/test.jsonl", exams)
    statements = [
        {"text": f"a {animal} is bad", "toxicity_ai": 1.0 + i % 4, "toxicity_human": 3.0}
        for i, animal in enumerate(ANIMALS)
    ]
    write(folder / "toxigen/test.jsonl", statements)
    pair = {"type": 1, "split": "dev", "idx": 1}
    sentences = [
        pair | {"stereotype": "pro", "sentence": "[The cook] met the nurse and [he] left ."},
        pair | {"stereotype": "anti", "sentence": "The CEO met [the nurse] after [his] talk."},
    ]
    write(folder / "winobias/all.jsonl", sentences * 4)
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def color():\n",
        "entry_point": "color",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    write(folder / "humaneval/test.jsonl", [problem])
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets, which the variable KERAS_GEMMA_BENCHMARKS names."""
    folder = os.environ.get("KERAS_GEMMA_BENCHMARKS")
    if folder is None:
        pytest.skip("KERAS_GEMMA_BENCHMARKS names no folder")
    return Path(folder)
