"""Reads and writes PEFT's folder with one LoRA adapter.

    adapter_config.json          rank, alpha, and module names as in Hugging Face
    adapter_model.safetensors    A `[r, in]` and B `[out, r]` of each module

Other kinds of adapters are refused. Pickles (`adapter_model.bin`) are not read.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma import catalogue
from keras_gemma.lora.adapters import Arrays, check_finite
from keras_gemma.lora.config import Lora, check_lora_numbers, target_names
from keras_gemma.storage.files import (
    Kind,
    check_target,
    check_types,
    local_path,
    read_json,
    replacing,
    write_json,
)
from keras_gemma.storage.hugging_face.layout import tensor_name
from keras_gemma.storage.hugging_face.safetensors import save_file, tensors
from keras_gemma.storage.tensor_streaming import StoredTensor, TensorSpec, compare, report_problems

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

_NUMBER, _NONE = (int, float), type(None)
_TYPES = {
    "r": (int,),
    "lora_alpha": _NUMBER,
    "lora_dropout": _NUMBER,
    "use_rslora": (bool,),
    "rank_pattern": (dict, _NONE),
    "alpha_pattern": (dict, _NONE),
    "target_modules": (str, list, _NONE),
}
_HARMLESS = {
    *_TYPES,
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "megatron_config", "megatron_core", "parent_library", "peft_type"),
    *("peft_version", "qalora_group_size", "revision", "task_type"),
}
"""Keys of adapter_config.json that do not change the computation of LoRA."""
_REASONS = {
    "use_dora": "DoRA also learns the length of each row",
    "bias": "biases are trained, and Gemma has none",
    "modules_to_save": "whole modules are trained in addition to the adapter",
    "fan_in_fan_out": "its matrices are transposed",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the matrices of the base model."""

ADAPTERS = Kind("folders of adapters", lambda folder: (folder / CONFIG).is_file())
"""Folders that saving an adapter may replace."""


def save_lora(
    backbone: Any,
    directory: str | Path,
    name: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Implements `GemmaCausalLM.save_lora`."""
    directory = local_path(directory, "directory")
    check_target(directory, ADAPTERS, overwrite, "directory")
    name = backbone.adapters.active_name(name)
    arrays = backbone.adapters.arrays(name)
    check_finite(arrays, f"The adapter {name!r}")
    base_model = base_model or _name_for_peft(backbone.preset)
    config = _to_values(backbone.adapters.configs[name], backbone.config, base_model)
    stored = {}
    for matrix, pair in arrays.items():
        for part, array in zip("AB", pair, strict=True):
            stored[_tensor(matrix, part)] = np.ascontiguousarray(array)
    with replacing(directory, lambda file: file == PICKLE, "directory") as folder:
        write_json(folder / CONFIG, config)
        save_file(stored, folder / WEIGHTS, {"format": "pt"})


def load_lora(backbone: Any, directory: str | Path, name: str, dtype: str) -> None:
    """Implements `GemmaCausalLM.load_lora`."""
    backbone.adapters.check_name(name)
    folder = find_adapter(directory)
    values = _read_values(folder / CONFIG)
    # Some files omit the prefix.
    found = tensors(folder / WEIGHTS).items()
    stored = {PREFIX + name.removeprefix(PREFIX): tensor for name, tensor in found}
    lora = _check(stored, values, backbone.config, folder, dtype)
    arrays: Arrays = {}
    for matrix in lora.sizes:
        a, b = (stored[_tensor(matrix, part)].read().astype("float32") for part in "AB")
        arrays[matrix] = a, b
    check_finite(arrays, str(folder / WEIGHTS))
    backbone.adapters.add(name, lora, arrays)


def find_adapter(directory: str | Path) -> Path:
    """Returns the adapter's folder after checking that both of its files exist."""
    if isinstance(directory, str) and "://" in directory:
        raise ValueError(
            "`directory` must be a folder on this machine: fetch it first with "
            f"`huggingface_hub.snapshot_download('owner/name')`. Received: {directory!r}"
        )
    folder = local_path(directory, "directory")
    for file in (CONFIG, WEIGHTS):
        if (folder / file).is_file():
            continue
        remedy = "Name a folder that `save_lora` or PEFT's `save_pretrained` wrote."
        if file == WEIGHTS and (folder / PICKLE).is_file():
            remedy = (
                f"{PICKLE} is a pickle, which is never read: save the adapter again with PEFT's "
                "`save_pretrained(..., safe_serialization=True)`."
            )
        within = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        if file == CONFIG and within:
            remedy = f"There is an adapter in {within[0]}: pass that folder."
        raise FileNotFoundError(f"{folder} holds no {file}. {remedy}")
    return folder


def base_model(directory: str | Path) -> str | None:
    """Returns the preset of the model that an adapter was trained on, if the adapter names it."""
    name = read_json(find_adapter(directory) / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    if name in catalogue.presets() or "://" in name or Path(name).exists():
        return name
    for preset in catalogue.presets().values():
        if preset.hugging_face_handle == f"hf://{name}":
            return preset.name
    return f"hf://{name}" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else name


def _name_for_peft(preset: str | None) -> str | None:
    """Returns Hugging Face's name of a preset if it has one. PEFT loads models by this name."""
    published = catalogue.find(preset) if preset else None
    handle = (published and published.hugging_face_handle) or preset
    return handle and handle.removeprefix("hf://")


def _module(matrix: str) -> str:
    """Returns Hugging Face's module name of a matrix: `model.layers.0.self_attn.q_proj`."""
    return tensor_name(matrix, "gemma2").removesuffix(".weight")


def _tensor(matrix: str, part: str) -> str:
    return f"{PREFIX}{_module(matrix)}.lora_{part}.weight"


def _to_values(lora: Lora, config: Any, base_model: str | None) -> dict[str, Any]:
    """Returns the content of adapter_config.json.

    Modules whose rank or alpha differs from the most common one are named in full.
    """
    (rank, alpha), _ = Counter(lora.sizes.values()).most_common(1)[0]
    kinds: dict[str, list[str]] = {}
    for matrix in lora.sizes:
        kinds.setdefault(_module(matrix).rpartition(".")[2], []).append(_module(matrix))
    modules = []
    for kind, names in kinds.items():
        modules += [kind] if len(names) == config.num_layers else names
    sizes = {re.escape(_module(matrix)): size for matrix, size in lora.sizes.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": modules,
        "rank_pattern": {name: r for name, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in sizes.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _read_values(path: Path) -> dict[str, Any]:
    """Returns the content of the adapter_config.json of a plain LoRA adapter."""
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} describes an adapter of type {values.get('peft_type')!r}, but this "
            "package reads only 'LORA'. Convert it, or merge it into its model with PEFT."
        )
    check_types(values, _TYPES, path)
    missing = [key for key in ("r", "lora_alpha") if key not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Fetch or save the adapter again.")
    odd = {key: value for key, value in values.items() if value and key not in _HARMLESS}
    if odd.get("bias") == "none":
        del odd["bias"]
    if odd:
        listed = "; ".join(
            f"{key}={value!r:.80}" + (f" ({_REASONS[key]})" if key in _REASONS else "")
            for key, value in odd.items()
        )
        raise ValueError(
            f"{path} describes more than plain LoRA, which is not supported: {listed}. Merge the "
            "adapter into its model with PEFT's `merge_and_unload`, and load the result."
        )
    initialization = values.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{path} has init_lora_weights={initialization!r}, which changes the base "
            "model's matrices, so the adapter does not fit the published base model. Save it with "
            "PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    try:
        check_lora_numbers(values["r"], values["lora_alpha"], values.get("lora_dropout", 0.0))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return values


def _check(
    stored: dict[str, StoredTensor], values: dict[str, Any], config: Any, folder: Path, dtype: str
) -> Lora:
    """Returns the settings of an adapter after checking that all its tensors fit the model."""
    shapes = config.weight_shapes()
    specs, sizes = [], {}
    targeted = _targeted(values, config)
    for matrix in target_names(config, "all-linear"):
        name_a, name_b = _tensor(matrix, "A"), _tensor(matrix, "B")
        if matrix in targeted or name_a in stored or name_b in stored:
            out, length = shapes[matrix]
            rank = _pattern(values.get("rank_pattern"), matrix, values["r"])
            alpha = _pattern(values.get("alpha_pattern"), matrix, values["lora_alpha"])
            specs += [TensorSpec(name_a, (rank, length)), TensorSpec(name_b, (out, rank))]
            sizes[matrix] = rank, float(alpha)
    problems = compare(stored, specs)
    if not sizes and not problems:
        problems = ["no tensor belongs to a matrix of Gemma's blocks"]
    base = values.get("base_model_name_or_path") or ""
    report_problems(
        problems,
        f"The adapter in {folder} does not fit this model",
        f"Load it onto the model that it was trained on{base and f', {base}'}",
    )
    dropout, use_rslora = values.get("lora_dropout", 0.0), values.get("use_rslora", False)
    return Lora(sizes, float(dropout), use_rslora, dtype)


def _targeted(values: dict[str, Any], config: Any) -> set[str]:
    """Returns the matrices that `target_modules` lists. Empty if it has exceptions."""
    modules = values.get("target_modules")
    if not isinstance(modules, list) or any(
        values.get(key) for key in ("layers_to_transform", "exclude_modules")
    ):
        return set()
    return {
        matrix
        for matrix in target_names(config, "all-linear")
        if any(f".{_module(matrix)}".endswith(f".{module}") for module in modules)
    }


def _pattern(patterns: dict[str, Any] | None, matrix: str, default: Any) -> Any:
    """Returns the value of `rank_pattern` or `alpha_pattern` for a matrix."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", _module(matrix)):
                return value
        except re.error as error:
            raise ValueError(
                f"{CONFIG} has an invalid regular expression: {pattern!r}, {error}. "
                "Fetch or save the adapter again."
            ) from error
    return default
