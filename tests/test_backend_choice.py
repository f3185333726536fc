import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from keras_gemma.backend_choice import (
    KERAS_DEFAULTS,
    avoid_xnnpack,
    choose_backend,
    configured_backend,
    is_command,
    use_backend,
)

ROOT = Path(__file__).parents[1]


def only(*names):
    return lambda backend: backend in names


@pytest.mark.parametrize(
    ("environ", "configured", "installed", "expected"),
    [
        ({}, None, ("jax", "torch", "tensorflow"), "jax"),
        ({}, None, ("torch", "tensorflow"), "torch"),
        ({}, None, ("tensorflow",), "tensorflow"),
        ({}, "torch", ("jax", "torch"), "torch"),
        ({}, "tensorflow", ("jax",), "jax"),
        ({}, "numpy", ("torch", "numpy"), "torch"),
        ({"KERAS_BACKEND": "torch"}, "jax", ("jax", "torch"), "torch"),
        ({"KERAS_BACKEND": ""}, None, ("torch",), "torch"),
    ],
)
def test_choice(environ, configured, installed, expected):
    assert choose_backend(environ, configured, only(*installed)) == expected


def test_nothing_installed():
    with pytest.raises(ImportError, match=r'pip install "\.\[jax\]"'):
        choose_backend({}, "tensorflow", only())


def test_named_backend_is_missing():
    with pytest.raises(ImportError, match=r"^KERAS_BACKEND='torch', .*\.\[torch\]"):
        choose_backend({"KERAS_BACKEND": "torch"}, None, only("jax"))


def test_named_backend_is_unknown():
    with pytest.raises(ValueError, match=r"one of jax, torch, tensorflow.*'numpy'"):
        choose_backend({"KERAS_BACKEND": "numpy"}, None, only("jax", "numpy"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [(json.dumps({"backend": "torch"}), "torch"), ("{}", None), ("{broken", None), (None, None)],
)
def test_configuration_file(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "keras.json").write_text(text)
    assert configured_backend({"KERAS_HOME": str(tmp_path)}) == expected


def test_file_that_keras_wrote_chooses_nothing(tmp_path, command_environment):
    """The backend is the same in the first process and in the second."""
    del command_environment["KERAS_BACKEND"]
    program = "import keras_gemma, keras; print(keras.config.backend())"
    folder = Path(command_environment["KERAS_HOME"])
    assert not folder.exists()
    first, second = (
        subprocess.check_output(
            [sys.executable, "-c", program], env=command_environment, cwd=ROOT, text=True
        )
        for _ in range(2)
    )
    written = json.loads((folder / "keras.json").read_text())
    assert written == KERAS_DEFAULTS and written["backend"] == "tensorflow"
    assert first == second == "jax\n"
    for choice in ({"backend": "tensorflow"}, KERAS_DEFAULTS | {"epsilon": 1e-6}):
        (folder / "keras.json").write_text(json.dumps(choice))
        assert configured_backend(command_environment) == "tensorflow"


def test_running_keras_keeps_its_backend(monkeypatch):
    running = keras.config.backend()
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    assert use_backend() == use_backend(running) == running
    other = "torch" if running == "jax" else "jax"
    with pytest.raises(ValueError, match=f"already running on {running}"):
        use_backend(other)


def test_sets_the_environment_before_keras(monkeypatch):
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setattr("keras_gemma.backend_choice.is_installed", only("torch"))
    assert use_backend() == "torch"
    assert use_backend("torch") == "torch"
    with pytest.raises(ImportError, match=r"^backend='jax', but jax is not installed.*\.\[jax\]"):
        use_backend("jax")  # The variable is set, but the argument has the wrong value.


@pytest.mark.parametrize(
    ("version", "flags", "expected"),
    [
        ("0.7.2", None, "--xla_cpu_use_xnnpack=false"),
        ("0.8.1", "--a=1", "--a=1 --xla_cpu_use_xnnpack=false"),
        ("0.8.0", "--xla_cpu_use_xnnpack=true", "--xla_cpu_use_xnnpack=true"),
        ("0.9.0", None, None),
        ("0.12.0.1", "--a=1", "--a=1"),
    ],
)
def test_versions_of_jax_without_xnnpack(version, flags, expected):
    environ = {} if flags is None else {"XLA_FLAGS": flags}
    avoid_xnnpack(environ, version)
    assert environ.get("XLA_FLAGS") == expected


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/usr/bin/keras-gemma", "chat"], ["python", "/usr/bin/keras-gemma", "chat"], True),
        (["-m", "chat"], ["python", "-m", "keras_gemma", "chat"], True),
        (["-m"], ["python", "-X", "dev", "-m", "another"], False),
        (["-m"], ["python", "-manother"], False),
        (["script.py", "-m", "keras_gemma"], ["python", "script.py", "-m", "keras_gemma"], False),
    ],
)
def test_command_detection(argv, original, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert is_command() is expected
