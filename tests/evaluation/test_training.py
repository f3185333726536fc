"""Benchmarks before and after training."""

import keras
import pytest

from keras_gemma import training
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.cli import main
from keras_gemma.evaluation import EvaluateCallback, evaluate


def change(lm):
    """Changes the weights, as a step of training does."""
    scale = lm.backbone.get_layer("final_normalization").weights[0]
    scale.assign(scale + 1.5 * keras.random.normal(scale.shape, seed=1))


def test_callback(data):
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    before = evaluate(lm, "arc_easy", data)["arc_easy"]
    callback = EvaluateCallback("arc_easy", every=2, data=data)
    callback.set_model(lm)
    callback.on_train_begin()
    for epoch in range(3):
        change(lm)
        logs = {"loss": 1.0}
        callback.on_epoch_end(epoch, logs)
        assert ("arc_easy" in logs) == (epoch == 1)
    callback.on_train_end()
    assert list(callback.results) == [0, 2, 3]
    first, _, last = (results["arc_easy"] for results in callback.results.values())
    assert first.metrics == before.metrics
    assert last.metrics == evaluate(lm, "arc_easy", data)["arc_easy"].metrics
    assert len({results.model["digest"] for results in callback.results.values()}) == 3


@pytest.mark.once
def test_fit_calls_the_callback(data):
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(optimizer=keras.optimizers.SGD(0.1))
    callback = EvaluateCallback("arc_easy:2", every=1, data=data)
    history = lm.fit(["To be, or not to be"], batch_size=1, callbacks=[callback], verbose=0)
    assert list(callback.results) == [0, 1]
    assert history.history["arc_easy"] == [callback.results[1]["arc_easy"].score]


@pytest.mark.once
def test_callback_refuses_a_folder():
    with pytest.raises(ValueError, match="`output` does not apply"):
        EvaluateCallback("arc_easy", output="folder")


def test_finetune_prints_scores_before_and_after(data, tmp_path, capsys, monkeypatch):
    def finetune(lm, dataset, output, **settings):
        change(lm)
        return training.FinetuneResult(output, 1, 1.0, None, False, None)

    monkeypatch.setattr(training, "finetune", finetune)
    monkeypatch.setattr("keras_gemma.cli.options.silence_frameworks", lambda: None)
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"text": "To be, or not to be"}\n')
    arguments = ["--data", str(samples), "--output", str(tmp_path / "run"), "--steps", "1"]
    arguments += ["--evaluate", "arc_easy:4", "--evaluate-data", str(data)]
    assert main(["finetune", "--model", "gemma_tiny_en", *arguments]) == 0
    title, row = (line for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert title.split() == ["metric", "shots", "items", "before", "after", "card", "chance"]
    assert row.split()[:4] == ["ARC-e", "acc", "0", "4"] and row.count("±") == 2


@pytest.mark.once
def test_wrong_task_is_found_before_training(data, tmp_path, capsys):
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"text": "To be"}\n')
    arguments = ["finetune", "--data", str(samples), "--output", str(tmp_path / "run")]
    assert main([*arguments, "--evaluate-data", str(data)]) == 2
    with pytest.raises(ValueError, match="Similar names are arc_easy"):
        main([*arguments, "--evaluate", "arc_esy"])
