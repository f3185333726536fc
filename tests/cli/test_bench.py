"""`keras-gemma bench`: table, JSON and errors."""

import json

import keras
import pytest

from keras_gemma import catalogue
from keras_gemma.benchmark import generation
from keras_gemma.cli import main
from keras_gemma.cli.bench import find_shape

FIGURES = {
    "backend": "jax",
    "parameters": 3_000_000,
    "layers": 2,
    "dtype": "bfloat16",
    "quantization": None,
    "prompt": 8,
    "new": 4,
    "batch": 1,
    "repeat": 3,
    "bandwidth_gb_per_second": 47.0,
    "best_product_gflop_per_second": 820.0,
    "best_product_dtype": "bfloat16",
    "weights_gb": 2.0,
    "read_per_step_gb": 2.1,
    "load_seconds": 1.5,
    "first_call_seconds": 12.0,
    "time_to_first_token_seconds": 0.25,
    "prefill_tokens_per_second": 12345.6,
    "prefill_fraction_of_best_product": 0.5,
    "decode_tokens_per_second": 17.25,
    "mbu": 0.82,
    "tokens_per_second": 15.0,
    "peak_loading_gb": 2.1,
    "peak_generating_gb": None,
    "peak_device_gb": None,
}


@pytest.fixture
def measured(monkeypatch):
    """Arguments of each call of `measure`, which is replaced."""
    calls = []

    def measure(make, work):
        calls.append((make, work))
        return FIGURES

    monkeypatch.setattr("keras_gemma.benchmark.generation.measure", measure)
    return calls


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gemma2_3b"], "'gemma2_2b_en', "),
        (["--shape", "gemma2_2b", "--layers", "0"], "--layers"),
        (["--shape", "gemma_tiny", "--layers", "1000"], "equal to 300. Received: 1000"),
        (["--layers", "2"], "needs --shape"),
        (["--shape", "gemma2_2b", "--preset", "gemma_tiny_en"], "not both"),
        (["--quantization", "int2"], "--quantization"),
        (["--dtype", "int8"], "--dtype"),
        (["--batch", "0"], "--batch"),
        (["--new", "1"], "--new"),
    ],
)
def test_wrong_usage(arguments, message, measured, capsys):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[0]
    assert len(captured.err.splitlines()) == 2
    assert captured.out == "" and measured == []


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gemma2_2b", "--prompt", "8190"], r"length of 8192.*prompt=8190, new=32"),
        (["--batch", "100000000", "--new", "4"], r"GB are free.*batch=100000000"),
        (["--preset", "gemma_tiny_fr"], "Unknown preset 'gemma_tiny_fr'"),
    ],
)
def test_invalid_work_is_rejected_before_it_starts(arguments, message, measured):
    with pytest.raises(ValueError, match=message):
        main(["bench", *arguments])
    assert measured == []


@pytest.mark.once
def test_shape_names():
    assert find_shape("gemma2_2b") == find_shape("gemma2_2b_en") == "gemma2_2b_en"


def test_shape_makes_random_weights(measured, capsys):
    arguments = ["--shape", "gemma_tiny", "--layers", "2", "--dtype", "bfloat16", "--batch", "3"]
    assert main(["bench", *arguments]) == 0
    make, work = measured[0]
    lm = make()
    assert (work.prompt, work.new, work.batch, work.repeat) == (32, 32, 3, 3)
    tiny = catalogue.presets()["gemma_tiny_en"].config
    assert lm.backbone.config.num_layers == 2
    assert lm.backbone.config.hidden_dim == tiny.hidden_dim
    assert lm.backbone.token_embedding.embeddings.dtype == "bfloat16"
    assert "random weights" in capsys.readouterr().out


def test_quantization(measured, capsys):
    for arguments in (["--shape", "gemma_tiny", "--layers", "1", "--dtype", "float32"], []):
        assert main(["bench", "--quantization", "int4", *arguments]) == 0
        lm = measured.pop()[0]()
        assert lm.backbone.quantization.mode == "int4"


def test_preset_is_loaded(measured):
    assert main(["bench", "--new", "4"]) == 0
    lm = measured[0][0]()
    assert lm.backbone.config == catalogue.presets()["gemma_tiny_en"].config
    assert lm.dtype == catalogue.presets()["gemma_tiny_en"].dtype


@pytest.mark.once
def test_table(measured, capsys):
    assert main(["bench"]) == 0
    lines = {line[:24].strip(): line for line in capsys.readouterr().out.splitlines()}
    for name, *cells in (
        ("memory bandwidth", "47 GB/s"),
        ("best matrix product", "820 GFLOP/s", "bfloat16 product"),
        ("prefill", "12,346 tokens/s", "50.0% of the best product"),
        ("decoding", "17.2 tokens/s", "82.0% of the bandwidth (MBU)"),
        ("peak memory, loading", "2.1 GB", "1.05 x the weights"),
        ("peak memory, generating", "unknown"),
    ):
        assert all(cell in lines[name] for cell in cells), lines[name]


def test_json_is_one_line(monkeypatch, capsys):
    """Measures the tiny shape, cut to one layer."""
    monkeypatch.setattr("keras_gemma.benchmark.machine.SIZES", (8,))
    arguments = ["--shape", "gemma_tiny", "--layers", "1", "--prompt", "4", "--new", "4"]
    assert main(["bench", "--json", "--repeat", "1", *arguments]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures["backend"] == keras.config.backend()
    assert figures["model"] == "gemma_tiny_en" and figures["random_weights"]
    assert figures["layers"] == 1 and figures["quantization"] is None
    assert set(FIGURES) <= set(figures)


def test_memory_of_quantized_weights(monkeypatch):
    """Gemma 2 2B: 5.2 GB in bfloat16, 2.6 GB in 8 bits."""
    config, work = (
        catalogue.presets()["gemma2_2b_en"].config,
        generation.Work(prompt=32, new=32, batch=1),
    )
    monkeypatch.setattr("keras_gemma.backend.free_memory", lambda: 4 << 30)
    generation.check_memory(config, work, "bfloat16", "int8")
    with pytest.raises(ValueError, match=r"weights need 5\.2 GB"):
        generation.check_memory(config, work, "bfloat16")
