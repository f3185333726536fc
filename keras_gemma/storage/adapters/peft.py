"""peft's folder with one LoRA adapter, read and written.

    adapter_config.json          rank, alpha, and which modules, by Hugging Face's names
    adapter_model.safetensors    A `[r, in]` and B `[out, r]` of each module

Adapters of the other kinds that peft knows are refused. Pickles, `adapter_model.bin`, are not read.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from keras_gemma.lora.adapters import Arrays, check_finite
from keras_gemma.lora.config import Lora, check_numbers, target_names
from keras_gemma.storage.files import check_types, local_path, read_json, replacing, write_json
from keras_gemma.storage.hugging_face.layout import tensor_name
from keras_gemma.storage.hugging_face.safetensors import tensors
from keras_gemma.storage.tensor_streaming import FLOAT_DTYPES, MAX_LISTED_PROBLEMS, StoredTensor

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
"""Keys of adapter_config.json that leave LoRA what it is."""
_REASONS = {
    "use_dora": "DoRA also learns the length of each row",
    "bias": "biases are trained, and Gemma has none",
    "modules_to_save": "whole modules are trained beside the adapter",
    "fan_in_fan_out": "its matrices are transposed",
}
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the base's own matrices."""


def save_lora(
    backbone: Any, directory: str | Path, name: str | None = None, base_model: str | None = None
) -> None:
    """See `GemmaCausalLM.save_lora`."""
    directory = local_path(directory, "directory")
    name = backbone.adapters.check_on(name)
    arrays = backbone.adapters.arrays(name)
    check_finite(arrays, f"The adapter {name!r}")
    config = _to_values(backbone.adapters.known[name], backbone.config, base_model)
    stored = {}
    for matrix, pair in arrays.items():
        for part, array in zip("AB", pair, strict=True):
            stored[_tensor(matrix, part)] = np.ascontiguousarray(array)
    with replacing(directory, lambda file: file == PICKLE, "directory") as folder:
        write_json(folder / CONFIG, config)
        save_file(stored, folder / WEIGHTS, {"format": "pt"})


def load_lora(backbone: Any, directory: str | Path, name: str, dtype: str) -> None:
    """See `GemmaCausalLM.load_lora`."""
    backbone.adapters.check_name(name)
    folder = find_adapter(directory)
    values = _read_values(folder / CONFIG)
    stored = tensors(folder / WEIGHTS)
    lora = _check(stored, values, backbone.config, folder, dtype)
    arrays: Arrays = {}
    for matrix in lora.sizes:
        a, b = (_find(stored, matrix, part).read().astype("float32") for part in "AB")
        arrays[matrix] = a, b
    check_finite(arrays, str(folder / WEIGHTS))
    backbone.adapters.add(name, lora, arrays)


def find_adapter(directory: str | Path) -> Path:
    """The folder, where it holds an adapter.

    Raises:
        ValueError: no folder of this machine.
        FileNotFoundError: it lacks one of the two files.
    """
    if isinstance(directory, str) and "://" in directory:
        raise ValueError(
            "`directory` must be a folder on this machine: fetch it first, by "
            f"`huggingface_hub.snapshot_download('owner/name')`. Received: {directory!r}"
        )
    folder = local_path(directory, "directory")
    for file in (CONFIG, WEIGHTS):
        if (folder / file).is_file():
            continue
        remedy = "Name a folder that `save_lora` or peft's `save_pretrained` wrote."
        if file == WEIGHTS and (folder / PICKLE).is_file():
            remedy = (
                f"{PICKLE} is a pickle, which is never read: save the adapter again by peft's "
                "`save_pretrained(..., safe_serialization=True)`."
            )
        within = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        if file == CONFIG and within:
            remedy = f"There is one in {within[0]}: name that."
        raise FileNotFoundError(f"{folder} holds no {file}. {remedy}")
    return folder


def _module(matrix: str) -> str:
    """What Hugging Face calls the module of a matrix: `model.layers.0.self_attn.q_proj`."""
    return tensor_name(matrix, "gemma2").removesuffix(".weight")


def _tensor(matrix: str, part: str) -> str:
    return f"{PREFIX}{_module(matrix)}.lora_{part}.weight"


def _to_values(lora: Lora, config: Any, base_model: str | None) -> dict[str, Any]:
    """What adapter_config.json says. A module with other numbers than most is named in full."""
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
    """The content of adapter_config.json, of an adapter that is plain LoRA."""
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} describes an adapter of the kind {values.get('peft_type')!r}, and this "
            "package reads 'LORA'. Convert it, or merge it into its model by peft."
        )
    check_types(values, _TYPES, path)
    missing = [key for key in ("r", "lora_alpha") if key not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Fetch or save the adapter again.")
    odd = {key: value for key, value in values.items() if value and key not in _HARMLESS}
    if odd.get("bias") == "none":
        del odd["bias"]
    if odd:
        reasons = (f" ({_REASONS[key]})" if key in _REASONS else "" for key in odd)
        told = (f"{key}={value!r:.80}" for key, value in odd.items())
        listed = "; ".join(map("".join, zip(told, reasons, strict=True)))
        raise ValueError(
            f"{path} describes more than plain LoRA, and only that is read: {listed}. Merge the "
            "adapter into its model by peft's `merge_and_unload`, and load that."
        )
    begin = values.get("init_lora_weights")
    if isinstance(begin, str) and begin.startswith(_MOVES_THE_BASE):
        raise ValueError(
            f"{path} says init_lora_weights={begin!r}, which changes the base's own matrices, so "
            "the adapter does not fit the base as published. Save it by peft's "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    try:
        check_numbers(values["r"], values["lora_alpha"], values.get("lora_dropout", 0.0))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return values


def _check(
    stored: dict[str, StoredTensor], values: dict[str, Any], config: Any, folder: Path, dtype: str
) -> Lora:
    """The settings of an adapter whose tensors all fit the model.

    Raises:
        ValueError: they do not; all of them are listed.
    """
    shapes = config.weight_shapes()
    problems, known, sizes = [], set(), {}
    wanted = _targeted(values, config)
    for matrix in target_names(config, "all-linear"):
        module = _module(matrix)
        out, length = shapes[matrix]
        rank = _pattern(values.get("rank_pattern"), module, values["r"])
        alpha = _pattern(values.get("alpha_pattern"), module, values["lora_alpha"])
        parts = {part: _find(stored, matrix, part) for part in "AB"}
        known |= {f"{start}{_tensor(matrix, p)[len(PREFIX) :]}" for p in "AB" for start in _STARTS}
        if not any(parts.values()) and matrix not in wanted:
            continue
        for part, shape in {"A": (rank, length), "B": (out, rank)}.items():
            tensor, name = parts[part], _tensor(matrix, part)
            if tensor is None:
                problems.append(f"missing: {name} {shape}")
            elif tensor.shape != shape:
                problems.append(f"shape: {name} is {tensor.shape}, expected {shape}")
            elif tensor.dtype not in FLOAT_DTYPES:
                problems.append(f"dtype: {name} is {tensor.dtype}, expected a float")
        sizes[matrix] = rank, float(alpha)
    problems += [f"unexpected: {n} {t.shape}" for n, t in stored.items() if n not in known]
    if not sizes and not problems:
        problems.append("no tensor of a matrix of Gemma's blocks")
    if problems:
        rest = len(problems) - MAX_LISTED_PROBLEMS
        lines = problems[:MAX_LISTED_PROBLEMS] + ([f"… and {rest} more"] if rest > 0 else [])
        raise ValueError(
            f"The adapter in {folder} does not fit this model ({len(problems)} problems). Load it "
            "onto the model that it was trained on:" + "".join(f"\n  {line}" for line in lines)
        )
    dropout, use_rslora = values.get("lora_dropout", 0.0), values.get("use_rslora", False)
    return Lora(sizes, float(dropout), use_rslora, dtype)


_STARTS = (PREFIX, "")
"""What a tensor's name may begin with: peft's own, or none."""


def _find(stored: dict[str, StoredTensor], matrix: str, part: str) -> StoredTensor | None:
    name = _tensor(matrix, part)
    return stored.get(name) or stored.get(name.removeprefix(PREFIX))


def _targeted(values: dict[str, Any], config: Any) -> set[str]:
    """The matrices that `target_modules` names, where it does so plainly and not by exceptions."""
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


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """What peft's `rank_pattern` or `alpha_pattern` gives a module."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(
                f"{CONFIG} has a pattern that is no regular expression: {pattern!r}, {error}. "
                "Fetch or save the adapter again."
            ) from error
    return default
