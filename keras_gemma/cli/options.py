"""Options that several commands share, and the start of a command.

Knows no model and imports no framework.
"""

import dataclasses
import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from typer import BadParameter, Option

from keras_gemma.backend_choice import Backend, use_backend

DEFAULT_MODEL = "gemma_tiny_en"
"""Built-in model, used if no model is named."""

SIZES = {size: f"gemma2_instruct_{size}_en" for size in ("2b", "9b", "27b")}
"""Short names of the instruction-tuned models."""

Dtype = Literal["float32", "bfloat16", "float16"]
"""Data type of weights and activations."""

Quantization = Literal["int8", "int4"]
"""Precision of quantized matrices."""

LoadedQuantization = Literal["int8", "int4", "as_stored"]
"""Precision of the matrices of a model that is loaded. `as_stored` keeps those of a GGUF file."""

Fit = Literal["auto", "exact", "speed", "memory", "memory_extreme"]
"""Trade-off between precision and memory. `loading.py` defines each."""

Mode = Literal["chat", "factual", "creative"]
"""Named set of sampling settings."""

MODES: dict[Mode, dict[str, Any]] = {
    "chat": {"temperature": 0.7, "top_p": 0.95},
    "factual": {"sampler": "greedy"},
    "creative": {"temperature": 1.0, "top_p": 0.98},
}
"""Generation settings of each mode."""

MODEL_HELP = "Preset name, 2b, 9b, 27b, kaggle:// or hf:// handle, folder or GGUF file."

ModelOption = Annotated[str, Option(help=MODEL_HELP)]
DtypeOption = Annotated[
    Dtype | None,
    Option(help="Data type of weights and activations.", show_default="as stored"),
]
DeviceOption = Annotated[
    str | None, Option(help="cpu, gpu or gpu:1.", show_default="chosen by the backend")
]
BackendOption = Annotated[
    Backend | None,
    Option(help="Keras backend.", show_default="KERAS_BACKEND, or the first installed"),
]
SeedOption = Annotated[int | None, Option(help="The same seed gives the same text.")]
LoraOption = Annotated[
    Path | None,
    Option(
        help="Folder of a LoRA adapter, written by `finetune`, `save_lora` or PEFT.",
        exists=True,
        file_okay=False,
    ),
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON, one line per entry.")]
OverwriteOption = Annotated[
    bool, Option("--overwrite", help="Replace an earlier result. Nothing else is replaced.")
]
SilentOption = Annotated[bool, Option("--silent", help="Print only the text.")]
BenchmarkOption = Annotated[
    bool, Option("--benchmark", help="Print speed and peak memory to standard error.")
]
DebugOption = Annotated[
    bool, Option("--debug", help="Show tracebacks and the logs of the frameworks.")
]


@dataclasses.dataclass
class ModelOptions:
    """Options of the commands that run a model on texts: `chat`, `generate` and `score`."""

    file: Annotated[Path | None, Option(help="Read a prompt from this file.", exists=True)] = None
    model: Annotated[str | None, Option(help=MODEL_HELP, show_default="a built-in model")] = None
    lora: LoraOption = None
    fit: Annotated[
        Fit,
        Option(
            help="exact: not quantized; speed: int8; memory: int4; memory_extreme: int4, including "
            "the embedding; auto: the first of these that fits into memory."
        ),
    ] = "auto"
    preset: Annotated[Fit | None, Option(hidden=True, help="Earlier name of --fit.")] = None
    dtype: DtypeOption = None
    device: DeviceOption = None
    backend: BackendOption = None
    as_json: JsonOption = False
    debug: DebugOption = False

    def __post_init__(self) -> None:
        self.fit = self.preset or self.fit


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command: its parameter `options` becomes one option per `ModelOptions` field."""
    fields = dataclasses.fields(ModelOptions)

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        options = ModelOptions(**{field.name: arguments.pop(field.name) for field in fields})
        command(options=options, **arguments)

    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
        for field in fields
    ]
    parameters = dict(inspect.signature(command).parameters)
    del parameters["options"]
    texts, *others = parameters.values()
    run.__signature__ = inspect.Signature([texts, *shared, *others])  # type: ignore[attr-defined]
    return run


def full_name(model: str) -> str:
    """Returns the preset of a short name such as `2b`, and other names unchanged."""
    return SIZES.get(model.lower(), model)


def drop_none(**settings: Any) -> dict[str, Any]:
    """Returns the settings that are not `None`."""
    return {name: value for name, value in settings.items() if value is not None}


def read_prompts(prompts: list[str], stdin: TextIO, file: Path | None = None) -> list[str]:
    """Returns the prompts of the command line and of `file`. "-" means the content of `stdin`.

    Without any prompt or file, `stdin` is read if it is a pipe. A missing prompt, an empty pipe
    and an empty file are wrong usage.
    """
    if file is not None:
        prompts = [*prompts, _check_text(file.read_text(encoding="utf-8"), f"{file} is empty")]
    elif not prompts and not stdin.isatty():
        prompts = ["-"]
    if not prompts:
        raise BadParameter("pass a prompt, or pipe a text in", param_hint="PROMPT")
    if "-" not in prompts:
        return prompts
    piped = _check_text(stdin.read(), "standard input is empty")
    return [piped if prompt == "-" else prompt for prompt in prompts]


def _check_text(text: str, message: str) -> str:
    text = text.removesuffix("\n")
    if not text:
        raise BadParameter(message, param_hint="PROMPT")
    return text


def start(backend: Backend | None, device: str | None = None, debug: bool = False) -> None:
    """Sets framework, device and logging, before Keras is imported."""
    if debug:
        sys.excepthook = sys.__excepthook__
    else:
        silence_frameworks()
    choose_device(device)
    use_backend(backend)
    check_device(device)


def choose_device(device: str | None) -> None:
    """Restricts the frameworks to `device`, before any of them is imported."""
    if device is None:
        return
    kind, _, number = device.lower().replace("cuda", "gpu").partition(":")
    if kind not in ("cpu", "gpu") or (number and not number.isdecimal()):
        raise BadParameter(
            f"{device!r} must be cpu or gpu, optionally with a number as in gpu:1",
            param_hint="--device",
        )
    if kind == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu", KERAS_TORCH_DEVICE="cpu")
    elif number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number


def check_device(device: str | None) -> None:
    """Raises a ValueError if `device` is a GPU and the backend finds none."""
    if device is None or device.lower().startswith("cpu"):
        return
    import keras

    from keras_gemma import backend

    if backend.peak_device_memory() is None:  # None on a CPU
        raise ValueError(
            f"{keras.config.backend()} finds no GPU. Leave --device out, or install the "
            f"backend with GPU support. Received: --device {device}"
        )


def silence_frameworks() -> None:
    """Keeps logs, warnings and, in a pipe, progress bars off stderr, before Keras is imported.

    TensorFlow's native code always writes to file descriptor 2. Therefore the descriptor is
    redirected to the null device, and `sys.stderr` to a copy of the old one.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KAGGLEHUB_VERBOSITY", "error")  # It logs to stdout.
    for logger in ("absl", "jax", "tensorflow"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
