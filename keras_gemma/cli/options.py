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
from typing import Annotated, Any, Literal, get_args

from typer import BadParameter, Option

from keras_gemma import catalogue
from keras_gemma.backend_choice import Backend, use_backend

DEFAULT_MODEL = "gemma_tiny_en"
"""Built-in model, used if no model is named."""

DEFAULT_CHAT_MODEL = "gemma_tiny_instruct_en"
"""Built-in model of `chat` and `finetune`. It is too small for random sampling."""

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

SamplerName = Literal["greedy", "random", "top_k", "top_p", "min_p", "beam", "contrastive"]
"""Method that chooses the next token."""

SEARCHES = ("beam", "contrastive")
"""Samplers that cannot stream, because they know their text only at its end."""

MODEL_HELP = "Preset name, 2b, 9b, 27b, kaggle:// or hf:// handle, folder or GGUF file."


def complete_model(incomplete: str) -> list[str]:
    """Returns the preset names that start with `incomplete`, for the shell's completion."""
    return [name for name in catalogue.presets() if name.startswith(incomplete)]


ModelOption = Annotated[
    str | None,
    Option(
        "--model",
        "-m",
        help=MODEL_HELP,
        show_default="a built-in model",
        autocompletion=complete_model,
    ),
]
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
SilentOption = Annotated[bool, Option("--silent", "-q", help="Print only the text.")]
BenchmarkOption = Annotated[
    bool, Option("--benchmark", help="Print speed and peak memory to standard error.")
]
DebugOption = Annotated[
    bool, Option("--debug", help="Show tracebacks and the logs of the frameworks.")
]


@dataclasses.dataclass
class ModelOptions:
    """Options of the commands that run a model on texts: `chat`, `generate` and `score`."""

    file: Annotated[
        list[Path],
        Option("--file", "-f", help="Read a prompt from this file. Can be repeated.", exists=True),
    ] = dataclasses.field(default_factory=list)
    model: ModelOption = None
    lora: LoraOption = None
    fit: Annotated[
        Fit,
        Option(
            help="exact: not quantized; speed: int8; memory: int4; memory_extreme: int4, including "
            "the embedding; auto: the first of these that fits into memory."
        ),
    ] = "auto"
    preset: Annotated[str | None, Option(hidden=True, help="Earlier name of --fit.")] = None
    quantization: Annotated[
        LoadedQuantization | None, Option(help="Precision of the matrices, instead of --fit.")
    ] = None
    dtype: DtypeOption = None
    device: DeviceOption = None
    backend: BackendOption = None
    as_json: JsonOption = False
    debug: DebugOption = False

    def __post_init__(self) -> None:
        if self.preset is not None:
            if self.preset not in get_args(Fit):
                raise BadParameter(
                    f"{self.preset!r} is not one of {', '.join(get_args(Fit))}. To choose a model, "
                    "pass --model",
                    param_hint="--preset",
                )
            self.fit = self.preset
        if self.quantization is not None and self.fit != "auto":
            raise BadParameter("pass --fit or --quantization, not both")


@dataclasses.dataclass
class SamplingOptions:
    """Options of the commands that generate text: `chat` and `generate`."""

    mode: Annotated[
        Mode | None,
        Option(
            help="Sampling settings, which the options below override.",
            show_default="in chat: chat, or factual with the built-in model",
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        Option(
            "--max-new-tokens",
            "-n",
            min=1,
            help="Maximum number of new tokens.",
            show_default="the rest of the context, in generate at most 128",
        ),
    ] = None
    sampler: Annotated[
        SamplerName | None,
        Option(
            help="Sampling method.", show_default="greedy, or random if another option needs it"
        ),
    ] = None
    temperature: Annotated[
        float | None,
        Option(
            "--temperature", "-t", min=0, help="Divisor of the logits. 0 means greedy decoding."
        ),
    ] = None
    top_k: Annotated[
        int | None,
        Option("--top-k", "-k", min=1, help="Sample from the K most likely tokens."),
    ] = None
    top_p: Annotated[
        float | None,
        Option(
            "--top-p",
            "-p",
            help="Sample from the most likely tokens with total probability P.",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        Option(help="Minimum probability of a token, relative to the most likely one."),
    ] = None
    repetition_penalty: Annotated[
        float | None, Option(help="Above 1, tokens in the text become less likely.")
    ] = None
    stop: Annotated[list[str], Option(help="Stop string. Can be repeated.")] = dataclasses.field(
        default_factory=list
    )
    seed: Annotated[
        int | None, Option("--seed", "-s", help="The same seed gives the same text.")
    ] = None

    def settings(self, mode: Mode | None = None) -> dict[str, Any]:
        """Returns the generation settings. `mode` is the default of --mode."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own = drop_none(**values | {"stop": self.stop or None})
        mode = own.pop("mode", mode)
        return combine(MODES[mode] if mode else {}, own)


def combine(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns `settings` with `changes`, and without settings that contradict them."""
    filters = {"temperature", "top_k", "top_p", "min_p"}
    if changes.get("sampler") in ("greedy", *SEARCHES):
        settings = {name: value for name, value in settings.items() if name not in filters}
    if filters & changes.keys() and settings.get("sampler") == "greedy":
        settings = {name: value for name, value in settings.items() if name != "sampler"}
    settings = settings | changes
    if "seed" in settings and not ({"sampler", *filters} & settings.keys()):
        settings["sampler"] = "random"  # A seed has no effect on a greedy sampler.
    return settings


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command: a parameter that is a dataclass becomes one option per field."""
    own = inspect.signature(command).parameters
    groups = {
        name: {field.name: field for field in dataclasses.fields(parameter.annotation)}
        for name, parameter in own.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        for name, fields in groups.items():
            values = {field: arguments.pop(field) for field in fields}
            arguments[name] = own[name].annotation(**values)
        command(**arguments)

    parameters = []
    for name, parameter in own.items():
        for field in groups.get(name, {}).values():
            has_factory = field.default is dataclasses.MISSING
            default = field.default_factory() if has_factory else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, parameter.kind, default=default, annotation=field.type
                )
            )
        if name not in groups:
            parameters.append(parameter)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def full_name(model: str) -> str:
    """Returns the preset of a short name such as `2b`, and other names unchanged."""
    return SIZES.get(model.lower(), model)


def drop_none(**settings: Any) -> dict[str, Any]:
    """Returns the settings that are not `None`."""
    return {name: value for name, value in settings.items() if value is not None}


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
    os.environ.setdefault("TORCH_LOGS", "-all")  # PyTorch resets the levels of its loggers.
    for logger in ("absl", "jax", "tensorflow"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
