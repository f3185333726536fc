"""`evaluate` on made-up items: scores, files, resumed runs, and bad input."""

import csv
import json
import re
import signal
import subprocess
import sys

import keras
import pytest

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.evaluation import KerasGemmaLM, Results, evaluate
from keras_gemma.evaluation.answers import AnswerFile
from keras_gemma.evaluation.model_description import digest_of_weights
from keras_gemma.evaluation.tasks import spaced
from keras_gemma.scoring import score_tokens
from tests.evaluation.conftest import CountingLM, FakeLM, write


@pytest.mark.once
def test_scores_and_files(data, tmp_path):
    lm, lines = CountingLM(("arc_challenge", 3)), []
    results = evaluate(
        lm,
        "arc_challenge,hellaswag,mmlu,triviaqa,winobias",
        data,
        samples=6,
        shots=2,
        output=tmp_path,
        name="gemma3_1b",
        on_result=lambda result: lines.append(result.line()),
    )
    assert list(results) == ["arc_challenge", "hellaswag", "mmlu", "triviaqa", "winobias"]
    assert [line.split(":")[0] for line in lines] == list(results)
    arc = results["arc_challenge"]
    assert (arc.items, arc.of_items, arc.shots, arc.published, arc.chance) == (6, 8, 2, 0.384, 0.25)
    assert (
        arc.too_long == [["arc_challenge", spaced(6, 8)[3]]]
        and "1 longer than the context" in lines[0]
    )
    (log,) = tmp_path.glob("arc_challenge/samples_arc_challenge_*.jsonl")
    items = [json.loads(line) for line in log.read_text().splitlines()]
    assert [item["doc_id"] for item in items] == spaced(6, 8)
    assert arc.score == pytest.approx(sum(item["acc"] for item in items) / 6)
    (own,) = tmp_path.glob("mmlu/results_*.json")
    own = json.loads(own.read_text())
    assert own["groups"]["mmlu"]["acc,none"] == results["mmlu"].score
    assert own["n-samples"]["mmlu_anatomy"]["effective"] == 3
    assert "gap,none" in results["winobias"].metrics
    assert dict(Results.load(tmp_path)) == dict(results)
    assert "| ARC-c | 2 | 6 of 8 | acc |" in (tmp_path / "results.md").read_text()
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [float(row["score"]) for row in rows] == [one.score for one in results.values()]
    assert (tmp_path / "results.png").stat().st_size > 1000
    summary = json.loads((tmp_path / "summary.json").read_text())
    files = ["arc_challenge/test.jsonl", "arc_challenge/train.jsonl"]
    assert list(summary["tasks"]["arc_challenge"]["protocol"]["data"]) == files


def test_a_model_gets_the_scores_of_its_texts(data):
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    results = evaluate(lm, ["arc_easy"], data)
    lines = (data / "arc_easy/test.jsonl").read_text().splitlines()
    items = list(map(json.loads, lines))

    def likelihood(item, choice):
        prompt = f"Question: {item['question']}\nAnswer:"
        scores = score_tokens(lm, f"{prompt} {choice}").log_probabilities
        return scores[1 + len(lm.preprocessor.tokenizer.encode([prompt])[0]) :].sum()

    right = 0
    for item in items:
        sums = [likelihood(item, choice) for choice in item["choices"]["text"]]
        right += sums.index(max(sums)) == "ABCD".index(item["answerKey"])
    assert results["arc_easy"].score == right / 8
    assert results["arc_easy"].tokens > 0
    same = evaluate(KerasGemmaLM(lm), ["arc_easy"], data)
    assert same.model == results.model
    assert same["arc_easy"].metrics == results["arc_easy"].metrics
    assert results.model["backend"] == keras.config.backend()


@pytest.mark.once
def test_a_task_that_exceeds_the_context_is_skipped(data):
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")  # Its context is as long as TriviaQA's answers.
    results = evaluate(lm, "triviaqa,arc_easy:1", data)
    assert list(results) == ["arc_easy"] and "256" in results.skipped["triviaqa"]


@pytest.mark.once
def test_chat(data, tmp_path):
    lm = GemmaCausalLM.from_preset("gemma_tiny_instruct_en")
    evaluate(lm, "arc_challenge:1", data, shots=1, output=tmp_path, chat=True)
    (log,) = tmp_path.glob("arc_challenge/samples_*.jsonl")
    prompt = json.loads(log.read_text())["arguments"]["gen_args_0"]["arg_0"]
    turns = ["user", "model", "user", "model"]
    assert re.findall(r"<start_of_turn>(\w+)", prompt) == turns
    assert prompt.startswith("<bos>") and prompt.endswith("<start_of_turn>model\n")


@pytest.mark.once
def test_an_interrupted_run_resumes(data, tmp_path):
    arguments = {"tasks": "arc_easy,hellaswag", "data": data, "shots": 0, "name": "fake"}
    whole = FakeLM()
    expected = evaluate(whole, **arguments)
    with pytest.raises(KeyboardInterrupt):
        evaluate(FakeLM(fails_after=50), **arguments, output=tmp_path)
    with pytest.raises(ValueError, match="`output` has files: pass `resume=True`"):
        evaluate(FakeLM(), **arguments, output=tmp_path)
    rest = FakeLM()
    resumed = evaluate(rest, **arguments, output=tmp_path, resume=True)
    assert {name: one.metrics for name, one in resumed.items()} == {
        name: one.metrics for name, one in expected.items()
    }
    assert expected["arc_easy"].tokens is None
    # 64 requests, of which the killed run answered 48 in batches of 4.
    assert len(whole.asked) == 64 and rest.asked == whole.asked[48:]
    again, kept = FakeLM(), []
    arguments |= {"output": tmp_path, "resume": True}
    assert dict(evaluate(again, **arguments, on_result=kept.append)) == dict(resumed)
    assert again.asked == [] and kept == list(resumed.values())


@pytest.mark.once
def test_long_items_are_known_after_a_resumed_run(data, tmp_path, capsys):
    arguments = {"tasks": "arc_easy", "data": data, "output": tmp_path, "name": "fake"}
    with pytest.raises(KeyboardInterrupt):  # after the first 4 of 8 items
        evaluate(CountingLM(("arc_easy", 2), fails_after=16), **arguments)
    assert "arc_easy: 1 of 8 items exceed the context" in capsys.readouterr().err
    results = evaluate(CountingLM(("arc_easy", 2)), **arguments, resume=True)
    assert results["arc_easy"].too_long == [["arc_easy", 2]]


@pytest.mark.once
def test_an_lm_is_restored(data, tmp_path):
    lm = CountingLM(("arc_easy", 5))
    hook, report = lm.cache_hook, lm.report
    evaluate(lm, "arc_easy", data, output=tmp_path, name="fake")
    assert lm.cache_hook is hook and lm.report is report
    assert evaluate(lm, "arc_easy:2", data)["arc_easy"].too_long == []


KILLED_RUN = """
import os, signal, sys

from keras_gemma import GemmaCausalLM
from keras_gemma.evaluation import evaluate
from keras_gemma.evaluation.answers import AnswerFile

class DyingFile(AnswerFile):
    count = 0

    def add(self, request, answer):
        super().add(request, answer)
        self.count += 1
        if self.count == 5:
            os.kill(os.getpid(), signal.SIGKILL)

evaluate.__globals__["AnswerFile"] = DyingFile
evaluate(GemmaCausalLM.from_preset("gemma_tiny_en"), "arc_easy", sys.argv[1], output=sys.argv[2])
"""


@pytest.mark.once
def test_a_killed_process_resumes(data, tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED_RUN, str(data), str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    asked, loglikelihood = [], KerasGemmaLM.loglikelihood

    def spy(self, requests):
        asked.extend(requests)
        return loglikelihood(self, requests)

    monkeypatch.setattr(KerasGemmaLM, "loglikelihood", spy)
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    resumed = evaluate(lm, "arc_easy", data, output=tmp_path, resume=True)
    assert len(asked) == 4 * 8 - 5
    assert resumed["arc_easy"].metrics == evaluate(lm, "arc_easy", data)["arc_easy"].metrics


@pytest.mark.once
def test_another_protocol_or_model_is_run_again(data, tmp_path):
    arguments = {"data": data, "output": tmp_path, "name": "FakeLM"}
    first = evaluate(FakeLM(), "arc_easy", **arguments)
    lm = FakeLM()
    second = evaluate(lm, "arc_easy:4", **arguments, resume=True)
    assert (first["arc_easy"].items, second["arc_easy"].items, lm.asked) == (8, 4, [])
    with pytest.raises(ValueError, match=r"results of another model or precision \(FakeLM\)"):
        evaluate(FakeLM(), "arc_easy", data, output=tmp_path, resume=True, name="other")


@pytest.mark.once
def test_damaged_files_are_errors_before_work(data, tmp_path):
    lm = FakeLM()
    arguments = {"tasks": "arc_easy", "data": data, "output": tmp_path, "name": "fake"}
    evaluate(lm, **arguments)
    (answers,) = tmp_path.glob("answers-*.sqlite")
    answers.write_bytes(b"not a database" * 100)
    with pytest.raises(ValueError, match=re.escape(f"{answers} is damaged")):
        evaluate(lm, **arguments, resume=True)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json is damaged"):
        evaluate(lm, **arguments, resume=True)


@pytest.mark.once
def test_other_tasks_run_if_data_are_missing(data):
    results = evaluate(FakeLM(), "boolq,arc_easy", data)
    assert list(results) == ["arc_easy"]
    assert "has no file validation.jsonl. Put one there" in results.skipped["boolq"]
    assert "aps/super_glue" in results.skipped["boolq"]
    with pytest.raises(FileNotFoundError, match="too few examples for 3 shots"):
        evaluate(FakeLM(), "arc_easy", data, shots=3)


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tasks": "hellaswagg"}, "Similar names are hellaswag"),
        ({"tasks": "arc"}, "Similar names are .*arc_easy"),
        ({"tasks": "arc_easy:none"}, "arc_easy:200"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": "humaneval"}, "`run_programs=True`"),
        ({"samples": 0}, "`samples` must be a positive integer"),
        ({"shots": -1}, "`shots` must be a non-negative integer"),
        ({"resume": True}, "needs `output`"),
        ({"output": "folder"}, "`name` must be given with `output`"),
    ],
)
def test_bad_arguments(data, arguments, message):
    lm = FakeLM()
    with pytest.raises(ValueError, match=message):
        evaluate(lm, **{"tasks": "arc_easy", "data": data} | arguments)
    assert lm.asked == []


@pytest.mark.once
def test_programs_of_a_card_are_skipped_without_the_flag(data):
    results = evaluate(FakeLM(), ["card", "winobias"], data, name="gemma_2b_en", samples=2)
    assert "`run_programs=True`" in results.skipped["humaneval"]
    assert "has too few examples for 25 shots" in results.skipped["arc_challenge"]
    assert (results["hellaswag"].shots, results["hellaswag"].published) == (0, 0.714)


@pytest.mark.once
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("arc_easy/test.jsonl", '{"answerKey": "A"}', "test.jsonl lacks a column: 'question'"),
        ("mmlu/test.jsonl", '{"question": "Why?"}', "test.jsonl lacks a column: 'subject'"),
        ("arc_easy/test.jsonl", '["Why?"]', "test.jsonl must have a JSON object per line"),
    ],
)
def test_wrong_columns(tmp_path, file, content, message):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate(FakeLM(), file.partition("/")[0], tmp_path)


@pytest.mark.once
def test_files_without_items_skip_their_task(data, tmp_path):
    write(tmp_path / "boolq/validation.jsonl", [])
    for name in ("arc_easy/test.jsonl", "mmlu/test.jsonl", "mmlu/dev.jsonl"):
        rows = list(map(json.loads, (data / name).read_text().splitlines()))
        write(tmp_path / name, rows[:1] if "dev" in name else rows)
    results = evaluate(FakeLM(), "boolq,mmlu,arc_easy", tmp_path, shots=0)
    assert list(results) == ["arc_easy"]
    assert results.skipped["boolq"].endswith("validation.jsonl has no items.")
    assert results.skipped["mmlu"].endswith("dev.jsonl has no items of virology.")


@pytest.mark.once
def test_a_failed_check_leaves_no_files(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no file"):
        evaluate(FakeLM(), "boolq", data, output=tmp_path, name="fake")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(OSError, match=r"answers.sqlite cannot be used: unable to open"):
        AnswerFile(tmp_path / "none" / "answers.sqlite")


@pytest.mark.once
def test_the_digest_is_of_vocabulary_and_version(monkeypatch):
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    digests = {digest_of_weights(lm), digest_of_weights(lm)}
    assert len(digests) == 1
    lm.preprocessor.tokenizer.proto += b" "
    digests.add(digest_of_weights(lm))
    monkeypatch.setattr("keras_gemma.evaluation.model_description.__version__", "0.0.0")
    digests.add(digest_of_weights(lm))
    assert len(digests) == 3
