"""`score`, `convert`, `quantize` and `info MODEL`, with the built-in model."""

import io
import json
import os
import re
from typing import get_args

import numpy as np
import pytest

from keras_gemma import catalogue
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.cli import main
from keras_gemma.cli.convert import Format
from keras_gemma.cli.loading import Choice, bytes_of_fit, choose
from keras_gemma.cli.options import Fit, check_device, choose_device
from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import QuantizationConfig, report
from tests.configurations import GEMMA2

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def tiny():
    return GemmaCausalLM.from_preset("gemma_tiny_en")


def test_score(tiny, capsys):
    text = "To be, or not to be"
    assert main(["score", text, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    losses = np.array(tiny.score(text, scoring_mode="loss"))[0][: entry["tokens"]]
    np.testing.assert_allclose(entry["losses"], losses, rtol=1e-5)
    assert entry["nats_per_token"] == pytest.approx(losses.mean(), rel=1e-5)
    assert entry["perplexity"] == pytest.approx(tiny.perplexity(text), rel=1e-5)
    assert "".join(entry["pieces"]).replace("▁", " ") == text
    assert main(["score", text, "--tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"perplexity {entry['perplexity']:.4g}, ")
    assert len(lines) == 1 + entry["tokens"]
    assert main(["score", text * 100]) == 0  # longer than the context of 256 tokens
    assert f"perplexity {tiny.perplexity(text * 100):.4g}, " in capsys.readouterr().out
    assert main(["score", "b"]) == 0
    assert ", 1 token: " in capsys.readouterr().out


def test_convert(tmp_path, tiny, capsys):
    folder = tmp_path / "hf"
    assert main(["convert", "gemma_tiny_en", str(folder), "--to", "hugging_face"]) == 0
    assert "as hugging_face: 7 files" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "keras")]) == 0
    back = GemmaCausalLM.from_preset(tmp_path / "keras")
    prompt = "ROMEO:"
    np.testing.assert_allclose(*(np.array(lm.score(prompt)) for lm in (back, tiny)), rtol=1e-4)
    pytest.importorskip("tensorstore", reason="the extra `orbax` writes the arrays")
    assert main(["convert", str(folder), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert "as orbax: " in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "again")]) == 0
    pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    assert main(["convert", str(folder), str(file), "--gguf-type", "q8_0"]) == 0
    assert file.read_bytes()[:4] == b"GGUF"


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_lora(tmp_path, tiny, capsys, monkeypatch):
    """The adapter is loaded by `score`, `generate` and `chat`, and merged by `convert`."""
    folder, text = tmp_path / "tuned" / "adapter", "To be, or not to be"
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.enable_lora(4, targets="all-linear")
    for linear in lm.backbone.adapters.linears("default").values():
        low_rank = linear.low_ranks["default"]
        shapes = [tuple(variable.shape) for variable in (low_rank.a, low_rank.b)]
        low_rank.assign(*(np.random.default_rng(1).normal(0, 0.03, shape) for shape in shapes))
    lm.save_lora(folder)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~umask()}
    lora = ["--lora", str(folder)]
    assert main(["score", text, "--json", *lora]) == 0
    perplexity = json.loads(capsys.readouterr().out)["perplexity"]
    assert perplexity == pytest.approx(lm.perplexity(text), rel=1e-5)
    assert perplexity != pytest.approx(tiny.perplexity(text), rel=1e-2)
    assert main(["convert", "gemma_tiny_en", str(tmp_path / "merged"), *lora]) == 0
    merged = GemmaCausalLM.from_preset(tmp_path / "merged")
    assert not merged.lora_adapters
    assert merged.perplexity(text) == pytest.approx(perplexity, rel=1e-4)

    def load_lora(lm, path):
        raise ConnectionAbortedError(f"{path} onto {lm.backbone.preset}")

    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(GemmaCausalLM, "load_lora", load_lora)
    for command in ("generate", "chat"):
        with pytest.raises(ConnectionAbortedError, match="adapter onto gemma_tiny_en"):
            main([command, text, *lora])  # `chat` has another default model.
    monkeypatch.setattr(GemmaCausalLM, "from_preset", None)  # The adapter is checked first.
    with pytest.raises(
        FileNotFoundError, match=r"There is an adapter in .*tuned.adapter: pass that"
    ):
        main(["score", text, "--lora", str(tmp_path / "tuned")])


def error_of(weight):
    return weight.relative_error


def test_quantize(tmp_path, capsys):
    options = ["--bits", "int4", "--embedding", "int4", "--json"]
    assert main(["quantize", "gemma_tiny_en", str(tmp_path / "small"), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main(["quantize", "gemma_tiny_en", str(tmp_path / "other")]) == 0
    summary, written = capsys.readouterr().out.splitlines()
    assert summary.startswith("int4 in groups of 32, embedding int8; 11.4 MB before, 1.7 MB after")
    worst = max(report(GemmaCausalLM.from_preset(tmp_path / "other")).weights, key=error_of)
    assert summary.endswith(f"; error at most {worst.relative_error:.2%} ({worst.name})")
    assert written == f"Wrote gemma_tiny_en to {tmp_path / 'other'}: 7 files, 1.9 MB"
    assert (
        main(["quantize", str(tmp_path / "other"), str(tmp_path / "third"), "--bits", "int8"]) == 2
    )
    error = " ".join(capsys.readouterr().err.split())
    assert "SOURCE:" in error and "is quantized already (int4 in groups of 32, embedding i" in error
    lm = GemmaCausalLM.from_preset(tmp_path / "small")
    assert lm.backbone.quantization == QuantizationConfig("int4", embedding="int4")
    assert report(lm).bytes_after == result["bytes_after"]
    assert choose(str(tmp_path / "small"), "auto", None).arguments == {"dtype": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "x", "y.gguf", "--to", "keras"], "ends in .gguf"),
        (["convert", "x", "y", "--to", "gguf"], "ends in .gguf"),
        (["convert", "x", "y.gguf", "--max-shard-size", "1GB"], "one file"),
        (["quantize", "x", "y", "--bits", "int8", "--zero-points"], "require --bits int4"),
        (["quantize", "x", "y", "--bits", "int8", "--zeros"], "require --bits int4"),
        (["generate", "x", "--fit", "memory", "--quantization", "int8"], "not both"),
        (["generate", "x", "--preset", "memory", "--quantization", "int8"], "not both"),
        (["generate", "x", "--lora", "no_such_folder"], "no_such_folder"),
        (["generate", "x", "--device", "tpu9"], "must be cpu or gpu"),
        (["generate", "--file", "no_such_file"], "no_such_file"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_target_is_checked_before_the_model_is_read(command, tmp_path, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("The model was read.")

    monkeypatch.setattr(GemmaCausalLM, "from_preset", read)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`target` cannot be written: .*Pass a writable path"):
        main([command, "gemma_tiny_en", str(tmp_path / "file" / "model")])


def test_info_about_a_model(capsys):
    assert main(["info", "2b", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == "gemma2_instruct_2b_en"
    assert facts["parameters"] == 2614341888
    assert (facts["num_layers"], facts["sliding_window_size"]) == (26, 4096)
    assert main(["info", "gemma_tiny_en"]) == 0
    printed = capsys.readouterr().out
    assert "2,855,616" in printed
    assert re.search(r"^use_query_key_norm +False$", printed, re.M)


def test_info_tells_the_truth_about_a_folder(tmp_path, capsys):
    def facts(path):
        assert main(["info", str(path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    lm = GemmaCausalLM.from_preset("gemma_tiny_instruct_en", dtype="bfloat16")
    lm.save_to_preset(tmp_path / "keras")
    lm.save_to_hugging_face(tmp_path / "hf")
    lm.enable_lora(4, targets="all-linear", alpha=8)
    lm.save_lora(tmp_path / "adapter")
    lm.set_adapter(None)
    lm.quantize("int4")
    lm.save_to_preset(tmp_path / "small")
    folders = {name: facts(tmp_path / name) for name in ("keras", "hf", "small", "adapter")}
    for name, entry in folders.items():
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert entry["bytes on disk"] == sum(len(path.read_bytes()) for path in files)
    plain, hugging_face, small, adapter = folders.values()
    assert (plain["format"], hugging_face["format"]) == ("Keras preset", "Hugging Face checkpoint")
    assert plain["stored as"] == hugging_face["stored as"] == "bfloat16"
    assert plain["quantization"] is None
    assert small["stored as"] == "uint8, int8, bfloat16, float32"  # A uint8 holds two int4.
    assert small["quantization"] == "int4 in groups of 32, embedding int8"
    assert (adapter["rank"], adapter["alpha"]) == (4, 8)
    assert adapter["base model"] == "gemma_tiny_instruct_en"


def bits(choice: Choice) -> str | None:
    quantization = choice.arguments.get("quantization")
    return quantization and quantization.describe()


def test_auto_chooses_the_first_fit(monkeypatch):
    config = catalogue.presets()["gemma2_27b_en"].config
    needs = [bytes_of_fit(config, fit, "bfloat16") for fit in get_args(Fit)[1:]]
    assert needs == sorted(needs, reverse=True)
    choices = []
    for free in needs:
        monkeypatch.setattr("keras_gemma.backend.free_memory", lambda free=free: free)
        choices.append(bits(choose("gemma2_27b_en", "auto", None)))
    assert choices == [None, *(bits(choose("x", fit, None)) for fit in get_args(Fit)[2:])]
    reason = choose("gemma2_27b_en", "auto", None).reason
    size = f"{needs[-1] / 1e9:.1f} GB"
    assert reason.startswith(f"memory_extreme, needs up to {size} of {size} free; exact needs")
    monkeypatch.setattr("keras_gemma.backend.free_memory", lambda: GIGABYTE)
    with pytest.raises(ValueError, match=r"even memory_extreme needs .* 1.0 GB are free"):
        choose("gemma2_27b_en", "auto", None)
    monkeypatch.setattr("keras_gemma.backend.free_memory", lambda: None)
    assert choose("gemma2_27b_en", "auto", "float32").arguments == {"dtype": "float32"}


@pytest.mark.parametrize("option", ["--fit", "--preset"])
def test_fit_option_and_its_alias(option, monkeypatch):
    def from_preset(model, **arguments):
        raise ConnectionAbortedError(arguments["quantization"].describe())

    monkeypatch.setattr(GemmaCausalLM, "from_preset", from_preset)
    for command in ("chat", "generate", "score"):
        monkeypatch.setattr("sys.stdin", io.StringIO())
        with pytest.raises(ConnectionAbortedError, match="int8"):
            main([command, "x", option, "speed"])


def test_convert_knows_all_formats():
    from keras_gemma.storage.formats import FORMATS

    assert set(get_args(Format)) == {*FORMATS, "gguf"}


def test_requested_precision():
    assert bits(choose("x", "speed", None)) == QuantizationConfig("int8").describe()
    choice = choose("x", "auto", "bfloat16", "int4")
    assert choice.arguments == {"dtype": "bfloat16", "quantization": "int4"}
    assert choose("x", "exact", None).arguments == {"dtype": None}


def test_int4_weight_bytes():
    """Compares the estimate of both embeddings with the weights of a model."""
    from keras_gemma.model.backbone import GemmaBackbone

    sizes = GEMMA2 | {"vocabulary_size": 20000, "intermediate_dim": 128}
    config = GemmaConfig(**sizes)
    for embedding in ("int8", "int4"):
        quantization = QuantizationConfig("int4", embedding=embedding)
        backbone = GemmaBackbone(**sizes, dtype="bfloat16", quantization=quantization)
        expected = sum(weight.bytes for weight in backbone.named_weights().values())
        estimate = config.weight_bytes("int4", embedding)
        assert estimate == pytest.approx(expected, rel=0.01)


def test_devices(monkeypatch):
    monkeypatch.setattr("keras_gemma.backend.peak_device_memory", lambda: None)
    with pytest.raises(ValueError, match="finds no GPU"):
        check_device("cuda:1")
    check_device("cpu")
    check_device(None)
    names = ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "KERAS_TORCH_DEVICE")
    environment: dict[str, str] = {}
    monkeypatch.setattr("os.environ", environment)
    choose_device(None)
    choose_device("gpu")
    assert environment == {}
    choose_device("cuda:1")
    assert environment == {"CUDA_VISIBLE_DEVICES": "1"}
    choose_device("CPU")
    assert [environment[name] for name in names] == ["", "cpu", "cpu"]


@pytest.mark.once
@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_existing_targets(command, tmp_path, monkeypatch):
    """They are found before the model is read."""
    preset = tmp_path / "preset"
    assert main(["convert", "gemma_tiny_en", str(preset)]) == 0
    before = (preset / "model.weights.h5").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"mine": 1}')

    def read(*args, **kwargs):
        raise AssertionError("The model was read.")

    with monkeypatch.context() as patch:
        patch.setattr(GemmaCausalLM, "from_preset", read)
        with pytest.raises(ValueError, match=r"The target exists: .* pass --overwrite"):
            main([command, "gemma_tiny_en", str(preset)])
        for options in ([], ["--overwrite"]):
            with pytest.raises(ValueError, match="--overwrite replaces only folders of Gemma"):
                main([command, "gemma_tiny_en", str(tmp_path / "mine"), *options])
    assert (preset / "model.weights.h5").read_bytes() == before
    assert (tmp_path / "mine" / "config.json").read_text() == '{"mine": 1}'
    assert main([command, str(preset), str(preset), "--overwrite"]) == 0
    assert GemmaCausalLM.from_preset(preset).backbone.config
