"""Loading needs little more memory than the weights."""

import io
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_gemma import backend, progress
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import tensor_streaming as checkpoint
from keras_gemma.storage.gguf.writer import save_to_gguf
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import GEMMA2
from tests.storage.conftest import Task, assert_same_weights, make_backbone, save_to_hugging_face

# 34 million parameters, of which the embedding is a quarter.
LARGE = GEMMA2 | {
    "vocabulary_size": 16384,
    "num_layers": 6,
    "hidden_dim": 512,
    "intermediate_dim": 4096,
    "num_query_heads": 8,
    "head_dim": 64,
}
SLACK = 24 << 20
"""Bytes for allocator buffers, lazily loaded code and threads."""

QUANTIZING_SLACK = 96 << 20
"""Bytes for the chunks of all threads, for any model size."""

FORMS = ("h5", "h5_shards", "safetensors", "safetensors_shards")
DTYPES = ("bfloat16", "float32")

MEASURE = """
import sys
from pathlib import Path
from keras_gemma import GemmaBackbone

GemmaBackbone(512, 2, 4, 2, 32, 96, 8)

def memory(what):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])

before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
quantization = {"int8": "int8", "int4": {"mode": "int4", "embedding": "int4"}}
bits = quantization.get(sys.argv[3])
if bits is not None:
    GemmaBackbone(512, 2, 4, 2, 64, 128, 16, dtype=sys.argv[2]).quantize(bits)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
arguments = {} if bits is None else {"quantization": bits}
if sys.argv[3] == "random":
    arguments["load_weights"] = False
backbone = GemmaBackbone.from_preset(sys.argv[1], dtype=sys.argv[2], **arguments)
print(memory("VmHWM") - before)
"""
"""Program of a subprocess, because a load leaves memory in the allocator."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A backbone, and folders with its weights in both formats, with and without shards."""
    folder = tmp_path_factory.mktemp("large")
    backbone = make_backbone(LARGE, dtype="bfloat16")
    backbone.save_to_preset(folder / "h5")
    backbone.save_to_preset(folder / "h5_shards", max_shard_size="20MB")
    save_to_hugging_face(Task(backbone), folder / "safetensors")
    save_to_hugging_face(Task(backbone), folder / "safetensors_shards", max_shard_size="20MB")
    return backbone, folder


def measure_peak(folder, dtype, quantization, environment):
    """Returns the peak memory of a load, in bytes above the memory before."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype, quantization],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)


@needs_linux
def test_peak_memory(large, command_environment):
    backbone, folder = large
    assert (folder / "h5_shards" / "model.weights.json").is_file()
    assert (folder / "safetensors_shards" / "model.safetensors.index.json").is_file()

    # Reading a file does not depend on the backend, so only JAX tests every pair.
    loads = list(itertools.product(FORMS, DTYPES))
    loads = loads if keras.config.backend() == "jax" else [loads[0], loads[3], loads[5], loads[6]]
    with ThreadPoolExecutor(2) as pool:
        peaks = pool.map(
            lambda load: measure_peak(folder / load[0], load[1], "none", command_environment), loads
        )
        peaks = list(peaks)
    for (form, dtype), measured in zip(loads, peaks, strict=True):
        size = backbone.config.weight_bytes(dtype)
        largest = size * 16384 * 512 // backbone.config.parameter_count
        assert 0.9 * size < measured <= 1.15 * size + largest + SLACK, (form, dtype)


@needs_linux
def test_peak_memory_of_random_weights(large, command_environment):
    backbone, folder = large
    size = backbone.config.weight_bytes("bfloat16")
    measured = measure_peak(folder / "h5", "bfloat16", "random", command_environment)
    assert 0.9 * size < measured <= 1.15 * size + SLACK


@needs_linux
def test_peak_memory_of_quantizing(tmp_path, tiny_proto, command_environment):
    """Covers quantization while loading, in all formats, and loading of a quantized preset."""
    sizes = LARGE | {"vocabulary_size": 98304, "num_layers": 2}  # the embedding is most of it
    with backend.uninitialized():
        backbone = GemmaBackbone(**sizes, dtype="bfloat16")
    numbers = np.random.default_rng(0).normal(size=65537).astype("float32")
    for weight in backbone.named_weights().values():
        weight.assign(np.resize(numbers, weight.shape))
    backbone.save_to_preset(tmp_path / "h5")
    save_to_hugging_face(Task(backbone), tmp_path / "safetensors")
    preprocessor = GemmaCausalLMPreprocessor(GemmaTokenizer(tiny_proto))
    save_to_gguf(Task(backbone, preprocessor), tmp_path / "model.gguf", "q8_0")
    backbone.quantize("int4", embedding="int4")
    backbone.save_to_preset(tmp_path / "quantized")
    largest, weights = 2 * 98304 * 512, {"int4": sum_bytes(backbone)}
    weights["int8"] = backbone.config.weight_bytes("int8")
    loads = [("h5", "int8"), ("h5", "int4"), ("safetensors", "int4"), ("quantized", "none")]
    loads.append(("model.gguf", "int8"))
    with ThreadPoolExecutor(2) as pool:
        peaks = pool.map(
            lambda load: measure_peak(tmp_path / load[0], "bfloat16", load[1], command_environment),
            loads,
        )
        for (form, mode), measured in zip(loads, peaks, strict=True):
            size = weights["int4" if mode == "none" else mode]
            room = {"quantized": largest / 4, "model.gguf": 0}.get(form, largest)
            assert 0.9 * size < measured <= 1.2 * size + room + QUANTIZING_SLACK, (
                form,
                mode,
                measured,
            )


def sum_bytes(backbone):
    return sum(weight.bytes for weight in backbone.named_weights().values())


@pytest.mark.parametrize("form", FORMS)
def test_loaded_weights_equal_saved_ones(form, large):
    backbone, folder = large
    assert_same_weights(GemmaBackbone.from_preset(folder / form, dtype="bfloat16"), backbone)


def test_largest_tensor_is_read_first(monkeypatch):
    backbone = make_backbone(GEMMA2)
    places = {n: checkpoint.TensorSpec(n, w.shape) for n, w in backbone.named_weights().items()}
    read, taken = [], []

    class Weight:
        def __init__(self, name, weight):
            self.name, self.shape, self.dtype = name, weight.shape, weight.dtype

        def pack(self, array):
            assert len(read) - len(taken) <= checkpoint.READ_AHEAD + 1
            return array

        def take(self, packed):
            taken.append((self.name, packed.size))

    def tensor(name, shape):
        def content():
            read.append(name)
            return np.zeros(shape, "float32")

        return checkpoint.StoredTensor(shape, "float32", content)

    weights = {name: Weight(name, weight) for name, weight in backbone.named_weights().items()}
    stored = {name: tensor(name, weight.shape) for name, weight in weights.items()}
    checkpoint.stream(stored, places, weights)
    assert sorted(name for name, _ in taken) == sorted(weights)
    sizes = [size for _, size in taken]
    assert sizes == sorted(sizes, reverse=True)


def test_assigned_array_stays_unchanged():
    weight = make_backbone(GEMMA2).named_weights()["layers.0.gate"]
    array = backend.empty(weight.shape, "float32")
    array[:] = 1
    weight.assign(array)
    array[:] = 2
    np.testing.assert_array_equal(weight.numpy(), np.ones(weight.shape))


def test_file_that_shrinks_while_reading(tmp_path):
    (tmp_path / "file").write_bytes(bytes(12))
    assert checkpoint.in_file(tmp_path / "file", 4, (2,), "float32").read().tolist() == [0, 0]
    with pytest.raises(ValueError, match="cut short"):
        checkpoint.in_file(tmp_path / "file", 8, (2,), "float32").read()


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("patience", "shown"), [(0, True), (1000, False)])
def test_progress_bar_of_slow_load(patience, shown, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setenv("TERM", "xterm")
    with progress.bar("Loading", 4) as advance:
        for _ in range(4):
            advance(1)
    assert ("Loading" in screen.getvalue()) == shown


def test_hidden_progress_bar(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    with progress.hidden(), progress.bar("Loading", 1) as advance:
        advance(1)
    assert screen.getvalue() == ""


def test_no_progress_bar_in_a_pipe(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0)
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with progress.bar("Loading", 1) as advance:
        advance(1)
    assert pipe.getvalue() == ""
