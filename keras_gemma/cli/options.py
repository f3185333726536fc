"""What several commands take: models by their size, backends, devices; prompts and their sources.

Knows no model and imports no framework.
"""

import logging
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from keras_gemma.backend_choice import BACKENDS, use_backend

SIZES = {size: f"gemma2_instruct_{size}_en" for size in ("2b", "9b", "27b")}
"""Short names for the models that answer."""

Backend = StrEnum("Backend", [(name, name) for name in BACKENDS])


class Dtype(StrEnum):
    """Of weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(StrEnum):
    """Bits of the matrices."""

    INT8 = "int8"
    INT4 = "int4"


class Fit(StrEnum):
    """How much memory a model may take; `loading.py` says what each means."""

    AUTO = "auto"
    EXACT = "exact"
    SPEED = "speed"
    MEMORY = "memory"
    MEMORY_EXTREME = "memory_extreme"


class Mode(StrEnum):
    """How bold the words are."""

    CHAT = "chat"
    FACTUAL = "factual"
    CREATIVE = "creative"


MODES: dict[Mode, dict[str, Any]] = {
    Mode.CHAT: {"temperature": 0.7, "top_p": 0.95},
    Mode.FACTUAL: {"sampler": "greedy"},
    Mode.CREATIVE: {"temperature": 1.0, "top_p": 0.98},
}
"""The settings of generation that each stands for."""

ModelOption = Annotated[
    str, typer.Option(help="Name, 2b, 9b or 27b, kaggle:// or hf:// handle, or directory.")
]
FitOption = Annotated[
    Fit,
    typer.Option(
        help="exact: as published; speed: 8 bits; memory: 4 bits; memory_extreme: 4 bits, the "
        "embedding too; auto: the first of them that fits."
    ),
]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Of weights and activations; by default the model's own.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, gpu, or gpu:1; by default what the backend takes.")
]
BackendOption = Annotated[
    Backend | None, typer.Option(help="By default KERAS_BACKEND, or the first installed.")
]
SeedOption = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
LoraOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of an adapter, of `finetune`, `save_lora` or peft, to put on the model.",
        exists=True,
        file_okay=False,
    ),
]
FileOption = Annotated[
    Path | None, typer.Option("--file", help="Read a prompt from this file.", exists=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON for each.")]
SilentOption = Annotated[bool, typer.Option("--silent", help="The text, and nothing beside it.")]
BenchmarkOption = Annotated[
    bool, typer.Option("--benchmark", help="Say how fast it went, on standard error.")
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and what the frameworks log.")
]


def full_name(model: str) -> str:
    """The preset that a short name such as `2b` stands for; other names as they are."""
    return SIZES.get(model.lower(), model)


def read_prompts(prompts: list[str], stdin: TextIO, file: Path | None = None) -> list[str]:
    """The prompts, with standard input in the place of "-", or alone where there is none.

    Args:
        prompts: of the command line.
        stdin: a pipe or a terminal.
        file: whose text is one more.

    Raises:
        typer.BadParameter: no prompt and no pipe, or nothing in the pipe or the file.
    """
    if file is not None:
        prompts = [*prompts, _filled(file.read_text(encoding="utf-8"), f"{file} is empty")]
    elif not prompts and not stdin.isatty():
        prompts = ["-"]
    if not prompts:
        raise typer.BadParameter("write one, or pipe a text in", param_hint="PROMPT")
    if "-" not in prompts:
        return prompts
    piped = _filled(stdin.read(), "standard input is empty")
    return [piped if prompt == "-" else prompt for prompt in prompts]


def _filled(text: str, otherwise: str) -> str:
    text = text.removesuffix("\n")
    if not text:
        raise typer.BadParameter(otherwise, param_hint="PROMPT")
    return text


def start(backend: Backend | None, device: str | None = None, debug: bool = False) -> None:
    """Choose the framework and its device; before Keras is imported."""
    if debug:
        sys.excepthook = sys.__excepthook__
    else:
        silence_frameworks()
    choose_device(device)
    use_backend(backend and backend.value)


def choose_device(device: str | None) -> None:
    """Let the frameworks see this device alone; before one of them is imported.

    Raises:
        typer.BadParameter: it is not called so.
    """
    if device is None:
        return
    kind, _, number = device.lower().replace("cuda", "gpu").partition(":")
    if kind not in ("cpu", "gpu") or (number and not number.isdecimal()):
        raise typer.BadParameter(
            f"{device!r} is neither cpu nor gpu, with or without a number as in gpu:1",
            param_hint="--device",
        )
    if kind == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu", KERAS_TORCH_DEVICE="cpu")
    elif number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number


def check_device(device: str | None) -> None:
    """Raise a ValueError where a GPU was asked for and the backend, loaded now, has none."""
    import keras

    from keras_gemma import backend

    wanted = device is not None and not device.lower().startswith("cpu")
    if wanted and backend.peak_device_memory() is None:  # which the CPU does not know
        raise ValueError(
            f"{keras.config.backend()} finds no GPU here: leave --device out, or install the "
            f"backend with support for it. Received: --device {device}"
        )


def silence_frameworks() -> None:
    """Keep logs, warnings and, in a pipe, progress bars off stderr; before Keras is imported.

    TensorFlow's native code writes to file descriptor 2 whatever it is told: from here on that
    leads nowhere, and `sys.stderr` to where it led before.
    """
    if not sys.stderr.isatty():
        hide_progress()
    os.environ.setdefault("KAGGLEHUB_VERBOSITY", "error")  # it reports to stdout
    for logger in ("absl", "jax", "tensorflow"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def hide_progress() -> None:
    """No bars of the hubs' clients; before they are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
