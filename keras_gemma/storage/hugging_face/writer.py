"""Writes a Hugging Face folder with which transformers computes and tokenizes the same.

Names are those of `layout.py`, and `config_json.py` describes the model. Knows no framework:
weights are passed as NumPy arrays.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma import progress
from keras_gemma.storage.files import write_json
from keras_gemma.storage.hugging_face import config_json, layout
from keras_gemma.storage.hugging_face.tokenizer_json import SPECIAL, TURNS, write_tokenizer_json
from keras_gemma.storage.sharding import plan_shards
from keras_gemma.text.chat_template import CHAT_TEMPLATE
from keras_gemma.text.tokenizer import check_vocabulary_size

_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write(task: Any, folder: Path, max_shard_bytes: int) -> None:
    """Writes `task` to the empty `folder` for transformers' `from_pretrained`.

    Weights keep the dtype of the model's variables and are in memory one at a time. Without a
    preprocessor, tokenizer and generation settings are omitted.
    """
    backbone, preprocessor = task.backbone, task.preprocessor
    config = config_json.to_values(backbone.config)
    config["torch_dtype"] = backbone.named_weights()["token_embedding"].plain_dtype
    sizes = {name: weight.plain_bytes for name, weight in backbone.named_weights().items()}
    plan = plan_shards(sizes, max_shard_bytes)
    files: dict[str, Any] = {layout.CONFIG: config}
    if preprocessor is not None:
        tokenizer = preprocessor.tokenizer
        check_vocabulary_size(tokenizer, backbone.config.vocabulary_size)
        config |= _ids(tokenizer)
        tokenizer_json = write_tokenizer_json(tokenizer.proto, preprocessor.add_start_token)
        added = tokenizer_json["added_tokens"]
        files |= _tokenizer_files(preprocessor, added, backbone.config.context_length)
        # Not indented: Python's encoder would take seconds for 256,000 pieces.
        content = json.dumps(tokenizer_json, ensure_ascii=False)
        (folder / layout.TOKENIZER).write_text(content, encoding="utf-8")
        (folder / layout.VOCABULARY).write_bytes(tokenizer.proto)
    for name, content in files.items():
        write_json(folder / name, content)
    _write_weights(folder, backbone.named_weights(), plan, config["model_type"])


def write_safetensors(
    path: Path, weights: dict[str, Any], advance: Callable[[float], None] = lambda size: None
) -> None:
    """Writes `weights` to a safetensors file, one at a time.

    The `safetensors` package needs all tensors of a file in memory; this function needs one.
    Format:

        8 bytes     n, the length of the header, little-endian
        n bytes     header: JSON, {tensor: {"dtype", "shape", "data_offsets": [begin, end]}}
        the rest    the numbers, little-endian, without gaps, in the order of the header

    `advance` is called with the bytes of each written weight.
    """
    # Earlier releases of transformers refuse a file without "pt".
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + weight.plain_bytes
        header[name] = {
            "dtype": _DTYPES[weight.plain_dtype],
            "shape": list(weight.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the numbers begin at a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for weight in weights.values():
            array = np.ascontiguousarray(weight.numpy())
            file.write(array.reshape(-1).view(np.uint8))
            advance(weight.plain_bytes)


def _write_weights(
    folder: Path, weights: dict[str, Any], plan: list[list[str]], model_type: str
) -> None:
    """Writes the weights: one file, or the files of `plan` and their index."""
    weight_map = {}
    total = sum(weight.plain_bytes for weight in weights.values())
    with progress.bar("Saving", total) as advance:
        for number, names in enumerate(plan, start=1):
            file_name = layout.WEIGHTS if len(plan) == 1 else layout.SHARD.format(number, len(plan))
            tensors = {layout.tensor_name(name, model_type): weights[name] for name in names}
            write_safetensors(folder / file_name, tensors, advance)
            weight_map |= dict.fromkeys(tensors, file_name)
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / layout.WEIGHTS_INDEX, index)


def _ids(tokenizer: Any) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.start_token_id,
        "eos_token_id": tokenizer.end_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _tokenizer_files(
    preprocessor: Any, added: list[dict[str, Any]], context_length: int
) -> dict[str, Any]:
    """Returns the contents of the smaller tokenizer files, by name."""
    tokenizer = preprocessor.tokenizer
    stops = tokenizer.stop_token_ids
    special = {f"{name}_token": text for name, text in SPECIAL.items()}
    turns = [token["content"] for token in added if token["content"] in TURNS]
    if turns:
        special["additional_special_tokens"] = turns
    config = {
        "tokenizer_class": "GemmaTokenizer",
        **special,
        "add_bos_token": preprocessor.add_start_token,
        "add_eos_token": False,  # the preprocessor adds an end token only for training
        # All of them: transformers 5 uses this list instead of tokenizer.json's.
        "added_tokens_decoder": {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "use_default_system_prompt": False,
    }
    if len(turns) == len(TURNS):
        config["chat_template"] = CHAT_TEMPLATE
    return {
        layout.GENERATION_CONFIG: {
            **_ids(tokenizer),
            "eos_token_id": stops if len(stops) > 1 else stops[0],
        },
        layout.TOKENIZER_CONFIG: config,
        layout.SPECIAL_TOKENS: special,
    }
