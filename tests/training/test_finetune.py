"""`finetune`: losses, resumption, divergence, early stopping, output files, and the command."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_gemma import GemmaCausalLM
from keras_gemma.cli import main
from keras_gemma.training import FinetuneSettings, chat_dataset, checkpoint, finetune
from keras_gemma.training.log import COLUMNS, Log, smooth
from tests.models import make_lm
from tests.training.runs import PAIRS, SETTINGS, make, run_long

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tokenizer):
    return chat_dataset(PAIRS, tokenizer, 64)


def losses_of(result):
    return result.log.column("loss")[1]


class Stop(keras.callbacks.Callback):
    """Interrupts training after a number of steps, as a signal does."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rematerialize", [False, True])
def test_result(rematerialize, tiny_proto, data, tmp_path):
    lm = make(tiny_proto)
    settings = SETTINGS | {"steps": 8, "rematerialize": rematerialize}
    result = finetune(lm, data, tmp_path, **settings)
    assert result.steps == 8 and not result.stopped_early
    assert result.path == tmp_path / "adapter" and result.path.exists()
    steps, losses = result.log.column("loss")
    assert steps == list(range(1, 9)) and losses[-1] < 0.8 * losses[0]
    rates = result.log.column("learning_rate")[1]
    assert max(rates) == pytest.approx(2e-2) and rates[-1] < 1e-2


KILLED = """
import pathlib, sys
from tests.models import quickly
from tests.training.runs import Kill, run_long

with quickly():
    run_long(pathlib.Path(sys.argv[1]).read_bytes(), sys.argv[2], Kill())
"""


def test_killed_run_resumes_with_the_same_losses(tiny_proto, tmp_path, command_environment):
    """Another process is killed within an epoch, between two updates."""
    proto, folder = tmp_path / "proto", tmp_path / "cut"
    proto.write_bytes(tiny_proto)
    command = [sys.executable, "-c", KILLED, str(proto), str(folder)]
    killed = subprocess.run(command, env=command_environment, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = (folder / "log.csv").read_text()
    assert len(before.splitlines()) == 1 + 8
    assert checkpoint.read_metadata(folder / "last.safetensors")["step"] == 6
    rename_old_keys(folder / "last.safetensors")
    whole = run_long(tiny_proto, tmp_path / "whole")
    result = run_long(tiny_proto, folder)
    assert result.log.column("step")[0] == list(range(1, whole.steps + 1)) == list(range(1, 16))
    for column in ("loss", "validation_loss"):
        (steps, values), expected = (run.log.column(column) for run in (result, whole))
        assert steps == expected[0]
        np.testing.assert_allclose(values, expected[1], rtol=1e-6)
    assert (folder / "log.csv").read_text().startswith(before[: before.index("\n7,")])
    again = run_long(tiny_proto, folder)
    assert again.steps == whole.steps and losses_of(again) == losses_of(result)


def rename_old_keys(path):
    """Renames the keys of a checkpoint to those of older versions."""
    metadata = checkpoint.read_metadata(path)
    metadata["facts"] = metadata.pop("run_config")
    arrays = {name.replace("rng", "chance"): x for name, x in load_file(path).items()}
    assert "chance.0" in arrays
    save_file(arrays, path, {checkpoint.METADATA_KEY: json.dumps(metadata)})


def test_other_settings_are_errors(tiny_proto, data, tokenizer, tmp_path):
    finetune(make(tiny_proto), data, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=r"learning_rate: 0.02 before, 0.001 .*another `output`"):
        finetune(make(tiny_proto), data, tmp_path, **SETTINGS | {"learning_rate": 1e-3})
    lm = make(tiny_proto, lora=False)
    lm.enable_lora(rank=2, alpha=3, targets="all-linear", seed=0)
    with pytest.raises(ValueError, match=r"adapter: 'rank 2 .* alpha 16.* before, .*alpha 3"):
        finetune(lm, data, tmp_path, **SETTINGS)
    lm = make(tiny_proto, lora=False)
    lm.quantize("int8")
    lm.enable_lora(rank=2, targets="all-linear", seed=0)
    with pytest.raises(ValueError, match=r"quantization: None before, 'int8"):
        finetune(lm, data, tmp_path, **SETTINGS)
    lm = make(tiny_proto)
    norm = lm.backbone.named_weights()["final_norm"]
    norm.assign(norm.numpy() + 1)
    with pytest.raises(ValueError, match=r"other settings \(base: \d+ before, \d+ now\)"):
        finetune(lm, data, tmp_path, **SETTINGS)
    other = chat_dataset(PAIRS[:9], tokenizer, 64)
    with pytest.raises(ValueError, match="first batch"):
        finetune(make(tiny_proto), other, tmp_path, **SETTINGS)
    (tmp_path / "last.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a valid checkpoint of a run"):
        finetune(make(tiny_proto), data, tmp_path, **SETTINGS)


class Poisoned:
    """Data with one batch whose loss is NaN."""

    def __init__(self, data, index):
        self.data, self.index, self.num_batches = data, index, data.num_batches

    def __getitem__(self, index):
        x, y, weights = self.data[index]
        return x, y, weights * (np.nan if index == self.index else 1)


def test_nan_stops_training(tiny_proto, data, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 4, batch 3 of epoch 0: .* of step 2 is"):
        finetune(make(tiny_proto), Poisoned(data, 3), tmp_path, **SETTINGS)
    assert checkpoint.read_metadata(tmp_path / "last.safetensors")["step"] == 2
    with pytest.raises(FloatingPointError, match="No checkpoint has been written yet"):
        finetune(make(tiny_proto), Poisoned(data, 0), tmp_path / "new", **SETTINGS)


def test_full_disk(tiny_proto, data, tmp_path, monkeypatch):
    save, calls = checkpoint.save_file, []

    def full(arrays, path, **rest):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(arrays, path, **rest)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"previous one is intact.*No space left.*Free disk"):
        finetune(make(tiny_proto), data, tmp_path, **SETTINGS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.safetensors", "log.csv"]
    assert finetune(make(tiny_proto), data, tmp_path, **SETTINGS).steps == 2 * len(data)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_full_disk_of_the_log():
    with pytest.raises(OSError, match=r"/dev/full could not be written: .*No space.*Free disk"):
        Log(Path("/dev/full"))


def test_smoothing_is_centered():
    line = [float(i) for i in range(50)]
    np.testing.assert_allclose(smooth(line), line)
    assert smooth([5.0]) == [5.0] and smooth([]) == []
    rough = [float(i % 2) for i in range(400)]
    assert np.ptp(smooth(rough)[20:-20]) < 0.1


def test_early_stopping_keeps_the_best(tiny_proto, data, tokenizer, tmp_path, capsys):
    lm = make(tiny_proto)
    held_out = chat_dataset(["the heart-ache", "shocks"], tokenizer, 64, shuffle=False)
    result = finetune(
        lm,
        data,
        tmp_path,
        validation_data=held_out,
        samples=["to be 1"],
        sample_tokens=4,
        patience=2,
        **SETTINGS | {"learning_rate": 0.3, "epochs": 6, "verbose": True},
    )
    assert result.stopped_early and result.steps < 6 * len(data)
    losses = result.log.column("validation_loss")[1]
    assert result.validation_loss == min(losses) and len(losses) >= 3
    lm.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"))
    ((x, y, weights),) = held_out
    loss = lm.test_on_batch(x, y, weights, return_dict=True)["loss"] / weights.sum()
    np.testing.assert_allclose(loss, result.validation_loss, rtol=1e-4)
    printed = capsys.readouterr().out
    assert "> to be 1" in printed and "validation loss" in printed
    if pytest.importorskip("matplotlib"):
        assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_all_weights(tiny_proto, data, tmp_path):
    settings = SETTINGS | {"accumulate": 2, "learning_rate": 5e-3}
    result = finetune(make(tiny_proto, lora=False), data, tmp_path, **settings)
    losses = losses_of(result)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    lm = GemmaCausalLM.from_preset(result.path)
    assert lm.backbone.config.num_layers == 1 and result.path.name == "model"


def test_stream(tiny_proto, tokenizer, tmp_path):
    stream = chat_dataset(lambda: iter(PAIRS), tokenizer, 64, batch_size=2)
    with pytest.raises(ValueError, match="`steps` must be set"):
        finetune(make(tiny_proto), stream, tmp_path, **SETTINGS)
    settings = SETTINGS | {"steps": 6}
    whole = finetune(make(tiny_proto), stream, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(make(tiny_proto), stream, tmp_path / "cut", callbacks=[Stop(5)], **settings)
    result = finetune(make(tiny_proto), stream, tmp_path / "cut", **settings)
    np.testing.assert_allclose(losses_of(result), losses_of(whole), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"patience": True}, ValueError, "patience=True"),
        ({"learning_rate": 0}, ValueError, "learning_rate=0"),
        ({"warmup": 1.0}, ValueError, "warmup=1.0"),
        ({"weight_decay": -1}, ValueError, "weight_decay=-1"),
        ({"lr": 1}, TypeError, "`finetune` has no argument `lr`. Valid: epochs, steps"),
    ],
)
def test_bad_settings(settings, error, message, data, tmp_path):
    with pytest.raises(error, match=message):
        finetune(None, data, tmp_path, **settings)


@pytest.mark.parametrize(
    ("total", "epoch", "settings", "expected"),
    [(60, 5, {}, 5), (300, 100, {}, 30), (100, 100, {}, 20), (10, 10, {}, 10), (900, None, {}, 90),
     (300, 100, {"evaluate_every": 7}, 7), (5, None, {"evaluate_every": 7}, 5)],
)  # fmt: skip
def test_checkpoint_interval(total, epoch, settings, expected):
    assert FinetuneSettings(**settings).interval(total, epoch) == expected


@pytest.mark.once
def test_defaults_depend_on_data_and_model():
    def resolve(batches, width=2048, has_adapter=True, **settings):
        settings = FinetuneSettings(**settings).resolve(batches, width, has_adapter)
        return settings.epochs, settings.learning_rate

    assert resolve(20) == (10, 2e-4) and resolve(30, accumulate=2) == (14, 2e-4)
    assert resolve(200)[0] == resolve(5000)[0] == resolve(20, steps=3)[0] == 1
    assert resolve(None, steps=3) == (1, 2e-4)
    assert resolve(20, 128) == (10, pytest.approx(3.2e-3))
    assert resolve(20, 4096, False) == (10, pytest.approx(1e-5))
    assert resolve(20, epochs=2, learning_rate=1.0) == (2, 1.0)


def test_defaults_learn(tiny_proto, tokenizer, tmp_path):
    data = chat_dataset(PAIRS, tokenizer)
    losses = losses_of(finetune(make(tiny_proto), data, tmp_path, verbose=False))
    assert len(losses) == 200 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.once
def test_few_updates_and_missing_plots_are_noted(tiny_proto, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    settings = SETTINGS | {"steps": 1, "verbose": True}
    result = finetune(make(tiny_proto), data, tmp_path, **settings)
    printed = capsys.readouterr().out
    assert "note: the weights are updated only 1 time, which may teach little" in printed
    assert "no curves.png: it needs matplotlib, the extra `plots`" in printed
    with pytest.raises(ImportError, match=r"\.\[plots\].*log.csv"):
        result.log.figure()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "log.csv").stat().st_mode}  # weights are not only for the owner


@pytest.mark.once
def test_rows_longer_than_the_context(tiny_proto, tokenizer, data, tmp_path):
    long = chat_dataset(PAIRS, tokenizer, 8193)
    lm = make(tiny_proto)
    says = "`{}` has rows of 8193 tokens, but the model's context length is 8192"
    with pytest.raises(ValueError, match=says.format("data")):
        finetune(lm, long, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=says.format("validation_data")):
        finetune(lm, data, tmp_path, validation_data=long, **SETTINGS)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "-1"], "--learning-rate must be greater than or equal to 0"),
        (["--sequence-length", "257"], "--sequence-length: 257 tokens do not fit into the context"),
    ],
)
def test_command_checks_options_first(options, message, tmp_path, monkeypatch, capsys):
    def read(*arguments, **settings):
        raise AssertionError("read the data or the model")

    monkeypatch.setattr("keras_gemma.cli.options.silence_frameworks", lambda: None)
    monkeypatch.setattr("sys.excepthook", None)
    monkeypatch.setattr("keras_gemma.training.chat_dataset", read)
    monkeypatch.setattr(GemmaCausalLM, "from_preset", read)
    path = tmp_path / "data.jsonl"
    path.write_text("{}")
    command = ["finetune", "--data", str(path), "--output", str(tmp_path / "out")]
    assert main([*command, *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    command[-1] = f"{path}/out"
    with pytest.raises(ValueError, match=rf"`output` cannot be written: Not a dir.*{path}/out"):
        main(command)


def test_no_trainable_variables(tiny_proto, data, tmp_path):
    lm = make(tiny_proto, lora=False)
    lm.trainable = False
    with pytest.raises(ValueError, match=r"Call `lm.enable_lora"):
        finetune(lm, data, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="no preprocessor, which training requires"):
        finetune(make_lm(), data, tmp_path, **SETTINGS)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("keras_gemma.cli.options.silence_frameworks", lambda: None)
    monkeypatch.setattr("sys.excepthook", None)
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)) + "\nnothing\n")
    command = ["finetune", "--data", str(path), "--output", str(tmp_path / "out")]
    command += ["--sequence-length", "256", "--steps", "2", "--skip-bad"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "10 samples" in printed and "1 bad, skipped" in printed
    assert "skipped: data.jsonl, line 11: invalid JSON" in printed
    adapter = tmp_path / "out" / "adapter"
    advice = "Try it: keras-gemma chat --model gemma_tiny_instruct_en --lora "
    assert f": {adapter}\n{advice}" in printed
    assert printed.strip().endswith(str(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "gemma_tiny_instruct_en"
    if not all(map(importlib.util.find_spec, ("tensorflow", "tensorboard"))):
        with pytest.raises(ImportError, match="pip install tensorflow tensorboard"):
            main([*command, "--tensorboard", str(tmp_path / "board")])

    def loads(model, dtype):
        raise ConnectionAbortedError(dtype)

    monkeypatch.setattr("keras_gemma.cli.loading.stored_dtype", lambda model: "bfloat16")
    monkeypatch.setattr(GemmaCausalLM, "from_preset", loads)
    with pytest.raises(ConnectionAbortedError, match="mixed_bfloat16"):
        main([*command, "--full"])
    assert main([*command, "--full", "--quantization", "int4"]) == 2
    assert "quantized weights cannot be trained" in capsys.readouterr().err


def test_output_with_something_else(tiny_proto, data, tmp_path):
    """The folder is checked before the training, also for what is written at its end."""
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "notes").write_text("mine")
    for output in (tmp_path, tmp_path / "run"):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"`output` exists.*replaces only training runs"):
                finetune(None, data, output, overwrite=overwrite, **SETTINGS)
    (tmp_path / "run" / "log.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(ValueError, match="replaces only folders of adapters"):
        finetune(None, data, tmp_path / "run", **SETTINGS)


def test_overwrite_starts_again(tiny_proto, data, tmp_path):
    finetune(make(tiny_proto), data, tmp_path, **SETTINGS)
    changed = SETTINGS | {"epochs": 1}
    result = finetune(make(tiny_proto), data, tmp_path, overwrite=True, **changed)
    assert result.steps == len(data) == len(result.log.rows)
    assert finetune(make(tiny_proto), data, tmp_path, **changed).steps == len(data)
