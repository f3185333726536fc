"""`score`, `convert`, `quantize` and `info MODEL`, in this process, with the built-in model."""

import io
import json
import sys

import numpy as np
import pytest

from keras_gemma import catalogue
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.cli import main
from keras_gemma.cli.loading import Choice, choose, needed
from keras_gemma.cli.options import Dtype, Fit, Quantization, check_device, choose_device
from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import QuantizationConfig, report
from tests.configurations import GEMMA2
from tests.lora_values import fill

GIGABYTE = 10**9


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The process is left as it was."""
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    monkeypatch.setattr("keras_gemma.cli.options.silence_frameworks", lambda: None)


@pytest.fixture(scope="module")
def tiny():
    return GemmaCausalLM.from_preset("gemma_tiny_en")


def test_score(tiny, capsys):
    text = "To be, or not to be"
    assert main(["score", text, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    losses = np.array(tiny.score(text, scoring_mode="loss"))[0][: found["tokens"]]
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    assert found["perplexity"] == pytest.approx(tiny.perplexity(text), rel=1e-5)
    assert "".join(found["pieces"]).replace("▁", " ") == text
    assert main(["score", text, "--tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"perplexity {found['perplexity']:.4g}, ")
    assert len(lines) == 1 + found["tokens"]


def test_convert(tmp_path, tiny, capsys):
    folder = tmp_path / "hf"
    assert main(["convert", "gemma_tiny_en", str(folder), "--to", "hugging_face"]) == 0
    assert "as hugging_face: 7 files" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "keras")]) == 0
    back = GemmaCausalLM.from_preset(tmp_path / "keras")
    prompt = "ROMEO:"
    np.testing.assert_allclose(*(np.array(lm.score(prompt)) for lm in (back, tiny)), rtol=1e-4)
    pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    assert main(["convert", str(folder), str(file), "--gguf-type", "q8_0"]) == 0
    assert file.read_bytes()[:4] == b"GGUF"


def test_an_adapter(tmp_path, tiny, capsys, monkeypatch):
    """What `finetune` writes, beside the model in each command, and in it for good."""
    folder, text = tmp_path / "tuned" / "adapter", "To be, or not to be"
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.enable_lora(4, targets="all-linear")
    fill(lm.backbone, size=0.03)
    lm.save_lora(folder)
    lora = ["--lora", str(folder)]
    assert main(["score", text, "--json", *lora]) == 0
    found = json.loads(capsys.readouterr().out)["perplexity"]
    assert found == pytest.approx(lm.perplexity(text), rel=1e-5)
    assert found != pytest.approx(tiny.perplexity(text), rel=1e-2)
    assert main(["convert", "gemma_tiny_en", str(tmp_path / "merged"), *lora]) == 0
    merged = GemmaCausalLM.from_preset(tmp_path / "merged")
    assert not merged.lora_adapters
    assert merged.perplexity(text) == pytest.approx(found, rel=1e-4)

    def asked(lm, path):
        raise ConnectionAbortedError(path)

    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(GemmaCausalLM, "load_lora", asked)
    for command in ("generate", "chat"):
        with pytest.raises(ConnectionAbortedError, match="adapter"):
            main([command, text, *lora])
    monkeypatch.setattr(GemmaCausalLM, "from_preset", None)  # before the weights are read
    with pytest.raises(
        FileNotFoundError, match=r"There is an adapter in .*tuned.adapter: pass that"
    ):
        main(["score", text, "--lora", str(tmp_path / "tuned")])


def test_quantize(tmp_path, capsys):
    options = ["--bits", "int4", "--embedding", "int4", "--json"]
    assert main(["quantize", "gemma_tiny_en", str(tmp_path / "small"), *options]) == 0
    told = json.loads(capsys.readouterr().out)
    lm = GemmaCausalLM.from_preset(tmp_path / "small")
    assert lm.backbone.quantization == QuantizationConfig("int4", embedding="int4")
    assert report(lm).bytes_after == told["bytes_after"]
    assert choose(str(tmp_path / "small"), Fit.AUTO, None).arguments == {"dtype": None}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convert", "x", "y.gguf", "--to", "keras"], "ends in .gguf"),
        (["convert", "x", "y", "--to", "gguf"], "ends in .gguf"),
        (["convert", "x", "y.gguf", "--max-shard-size", "1GB"], "one file"),
        (["quantize", "x", "y", "--bits", "int8", "--zeros"], "require mode='int4'"),
        (["generate", "x", "--preset", "memory", "--quantization", "int8"], "not both"),
        (["generate", "x", "--lora", "no_such_folder"], "no_such_folder"),
        (["generate", "x", "--device", "tpu9"], "neither cpu nor gpu"),
        (["generate", "--file", "no_such_file"], "no_such_file"),
    ],
)
def test_wrong_usage(arguments, says, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_target_is_tried_before_the_model_is_read(command, tmp_path, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("The model was read.")

    monkeypatch.setattr(GemmaCausalLM, "from_preset", read)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`target` cannot be written: .*Pass a writable path"):
        main([command, "gemma_tiny_en", str(tmp_path / "file" / "model")])


def test_info_of_a_model(capsys):
    assert main(["info", "2b", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == "gemma2_instruct_2b_en"
    assert facts["parameters"] == 2614341888
    assert (facts["num_layers"], facts["sliding_window_size"]) == (26, 4096)
    assert main(["info", "gemma_tiny_en"]) == 0
    assert "2,855,616" in capsys.readouterr().out


def bits(choice: Choice) -> str | None:
    quantization = choice.arguments.get("quantization")
    return quantization and quantization.describe()


def test_auto_takes_the_first_that_fits(monkeypatch):
    config = catalogue.presets()["gemma2_27b_en"].config
    seen = []
    for free in (100, 40, 22, 20.5):
        monkeypatch.setattr("keras_gemma.backend.free_memory", lambda free=free: free * GIGABYTE)
        seen.append(bits(choose("gemma2_27b_en", Fit.AUTO, None)))
    assert seen == [None, *(bits(choose("x", fit, None)) for fit in list(Fit)[2:])]
    reason = choose("gemma2_27b_en", Fit.AUTO, None).reason
    assert reason.startswith("memory_extreme, which takes up to")
    assert "of 20.5 GB free; exact would take" in reason
    monkeypatch.setattr("keras_gemma.backend.free_memory", lambda: GIGABYTE)
    with pytest.raises(ValueError, match=r"even memory_extreme takes .* 1.0 GB are free"):
        choose("gemma2_27b_en", Fit.AUTO, None)
    monkeypatch.setattr("keras_gemma.backend.free_memory", lambda: None)
    assert choose("gemma2_27b_en", Fit.AUTO, Dtype.FLOAT32).arguments == {"dtype": "float32"}
    needs = [needed(config, fit, "bfloat16") for fit in list(Fit)[1:]]
    assert needs == sorted(needs, reverse=True)


def test_what_is_chosen_is_taken():
    assert bits(choose("x", Fit.SPEED, None)) == QuantizationConfig("int8").describe()
    choice = choose("x", Fit.AUTO, Dtype.BFLOAT16, Quantization.INT4)
    assert choice.arguments == {"dtype": "bfloat16", "quantization": "int4"}
    assert choose("x", Fit.EXACT, None).arguments == {"dtype": None}


def test_the_estimate_of_four_bits_is_what_they_take():
    """But for the cache, and what is beside: the embedding's share, by counting a model."""
    from keras_gemma.model.backbone import GemmaBackbone

    sizes = GEMMA2 | {"vocabulary_size": 20000, "intermediate_dim": 128}
    config = GemmaConfig(**sizes)
    taken = {}
    for fit, embedding in ((Fit.MEMORY, "int8"), (Fit.MEMORY_EXTREME, "int4")):
        quantization = QuantizationConfig("int4", embedding=embedding)
        backbone = GemmaBackbone(**sizes, dtype="bfloat16", quantization=quantization)
        taken[fit] = sum(weight.bytes for weight in backbone.named_weights().values())
    fits = (Fit.MEMORY, Fit.MEMORY_EXTREME)
    estimated = np.diff([needed(config, fit, "bfloat16") for fit in fits])
    assert estimated == pytest.approx(1.15 * np.diff([taken[fit] for fit in fits]), rel=0.01)


def test_devices(monkeypatch):
    monkeypatch.setattr("keras_gemma.backend.peak_device_memory", lambda: None)
    with pytest.raises(ValueError, match="finds no GPU here"):
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
