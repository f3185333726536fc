"""Writes one .gguf file with which llama.cpp computes what this package computes.

Knows llama.cpp's architectures `gemma`, `gemma2` and `gemma3`, and their keys. Refuses a model that
none of them computes. The package `gguf` writes the bytes of the format.
"""

import math
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from keras_gemma import progress
from keras_gemma.checks import check_one_of
from keras_gemma.config import PATTERN_GEMMA3, ROPE_THETA, GemmaConfig
from keras_gemma.extras import install_hint
from keras_gemma.storage.files import Kind, check_target, local_path, scratch_folder
from keras_gemma.storage.gguf.header import is_gguf
from keras_gemma.storage.gguf.layout import (
    NUM_LAYERS_27B,
    tensor_name,
)
from keras_gemma.text.chat_template import CHAT_TEMPLATE
from keras_gemma.text.pieces import SPACE, Pieces
from keras_gemma.text.preprocessor import require_preprocessor
from keras_gemma.text.tokenizer import check_vocabulary_size

FILE_TYPES = {
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
"""GGUF file type of each accepted `dtype`."""

MAX_FLOAT16 = 65504.0
MAX_MAGNITUDES = {"F16": MAX_FLOAT16, "Q8_0": 127 * MAX_FLOAT16, "Q4_0": 8 * MAX_FLOAT16}
"""Largest magnitude that a type can hold. Block types have a float16 scale."""

CHUNK_ELEMENTS = 1 << 22
"""Elements of a matrix that are converted at a time."""


GGUF_FILES = Kind("GGUF files", is_gguf, is_folder=False)
"""Files that saving a GGUF file may replace."""


def save_to_gguf(lm: Any, path: str | Path, dtype: str = "bf16", overwrite: bool = False) -> None:
    """Implements `GemmaCausalLM.save_to_gguf`.

    Tensors are converted one at a time into a file next to `path`, which replaces `path` when
    complete. Norms are always stored in float32. `"q8_0"` and `"q4_0"` divide matrix rows into
    blocks of 32; matrices whose rows are not divisible stay float16. With `"q4_0"`, the embedding,
    which is also the output head, is stored as `"q8_0"`.

    llama.cpp tokenizes texts to the same ids, except that it treats a literal `▁` as a space.
    """
    check_one_of("dtype", dtype, FILE_TYPES)
    path = local_path(path, "path").resolve()
    if path.suffix != ".gguf" or path.is_dir():
        advice = path / "gemma.gguf" if path.is_dir() else path.with_suffix(".gguf")
        raise ValueError(
            "`path` must name a file that ends in .gguf, not a folder. "
            f"Received: path={str(path)!r}. Name one such as {str(advice)!r}."
        )
    check_target(path, GGUF_FILES, overwrite, "path")
    config = lm.backbone.config
    architecture = architecture_of(config)
    require_preprocessor(lm.preprocessor, "a GGUF file", None)
    tokenizer = lm.preprocessor.tokenizer
    check_vocabulary_size(tokenizer, config.vocabulary_size)
    gguf = _import_gguf()

    with scratch_folder(path, "path") as work:
        fresh = work / path.name
        writer = gguf.GGUFWriter(fresh, architecture)
        try:
            writer.add_name(path.stem)
            writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_sizes(gguf, writer, config, architecture)
            _add_vocabulary(writer, tokenizer, config.vocabulary_size)
            _write_tensors(gguf, writer, lm.backbone.named_weights(), dtype)
        finally:
            writer.close()
        if path.exists():
            shutil.copymode(path, fresh)
        os.replace(fresh, path)


def architecture_of(config: GemmaConfig) -> str:
    """Returns the llama.cpp architecture that computes `config`, such as `"gemma2"`."""
    local = config.layer_kind(0)
    if config.use_query_key_norm:
        name = "gemma3"
        needs = {
            "use_post_attention_norm=True": config.use_post_attention_norm,
            "use_post_ffw_norm=True": config.use_post_ffw_norm,
            "no attention_logit_soft_cap": config.attention_logit_soft_cap is None,
            "use_sliding_window_attention=True": config.use_sliding_window_attention,
            f"sliding_window_pattern={PATTERN_GEMMA3}": (
                config.sliding_window_pattern == PATTERN_GEMMA3
            ),
            f"local_rope_wavelength={ROPE_THETA:g}": (local.rope_theta == ROPE_THETA),
            "local_rope_scaling_factor=1": local.rope_scaling == 1.0,
        }
    elif config.use_post_attention_norm or config.use_post_ffw_norm:
        name = "gemma2"
        needs = {
            "use_post_attention_norm=True": config.use_post_attention_norm,
            "use_post_ffw_norm=True": config.use_post_ffw_norm,
            "an attention_logit_soft_cap": config.attention_logit_soft_cap is not None,
            "a final_logit_soft_cap": config.final_logit_soft_cap is not None,
        }
    else:
        name = "gemma"
        needs = {
            "no attention_logit_soft_cap": config.attention_logit_soft_cap is None,
            "no final_logit_soft_cap": config.final_logit_soft_cap is None,
            "use_sliding_window_attention=False": not config.use_sliding_window_attention,
        }
    if name != "gemma3":
        rope = config.global_rope_wavelength, config.global_rope_scaling_factor
        needs |= {
            "one rotary base": rope == local[1:] or not config.use_sliding_window_attention,
            "no rope scaling factor": config.global_rope_scaling_factor == 1.0,
        }
        if config.use_sliding_window_attention:
            needs["sliding_window_pattern=2"] = config.sliding_window_pattern == 2
    deep = config.num_layers == NUM_LAYERS_27B.get(name)
    per_head = config.hidden_dim // config.num_query_heads if deep else config.head_dim
    needs[f"queries scaled by 1/sqrt({per_head}) at {config.num_layers} layers"] = math.isclose(
        config.query_scale, per_head**-0.5
    )
    missing = [need for need, met in needs.items() if not met]
    if missing:
        raise ValueError(
            f"llama.cpp has no architecture for this model, so it cannot be saved as GGUF: {name}, "
            f"the closest, needs {', and '.join(missing)}. Received: {config}. "
            "Use `save_to_preset` instead."
        )
    return name


def _import_gguf() -> ModuleType:
    try:
        import gguf
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401  # needs protobuf
    except ImportError as error:
        raise ImportError(
            f"`save_to_gguf` needs the packages gguf and protobuf. {install_hint('gguf')}"
        ) from error
    return gguf


def _add_sizes(gguf: ModuleType, writer: Any, config: GemmaConfig, architecture: str) -> None:
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.feed_forward_dim)
    writer.add_head_count(config.num_query_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.global_rope_wavelength)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window_size)
        if config.final_logit_soft_cap is not None:
            writer.add_final_logit_softcapping(config.final_logit_soft_cap)
        if config.global_rope_scaling_factor != 1.0:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.global_rope_scaling_factor)
    if architecture == "gemma2":
        # llama.cpp's gemma2 always has a window; one as long as the context masks nothing.
        local = config.use_sliding_window_attention
        writer.add_sliding_window(config.sliding_window_size if local else config.context_length)
        writer.add_attn_logit_softcapping(config.attention_logit_soft_cap)
        writer.add_final_logit_softcapping(config.final_logit_soft_cap)


def _add_vocabulary(writer: Any, tokenizer: Any, rows: int) -> None:
    """Adds the SentencePiece vocabulary, with unused tokens for further rows of the embedding.

    Control tokens are marked as such, although SentencePiece has many of them as plain pieces, so
    that llama.cpp parses them in a text as `tokenize` does with the same `parse_special`.
    """
    from sentencepiece import sentencepiece_model_pb2 as protobuf  # rarely needed

    model = protobuf.ModelProto.FromString(tokenizer.proto)
    control = Pieces(tokenizer.proto).control_tokens
    types = protobuf.ModelProto.SentencePiece  # numbered as in GGUF
    tokens, scores, kinds = [], [], []
    for piece in model.pieces:
        token, kind = piece.piece, piece.type
        if kind == types.USER_DEFINED and token in control:
            kind = types.CONTROL
        elif kind == types.USER_DEFINED:
            token = token.replace(SPACE, " ")  # llama.cpp matches these in the raw text
        tokens.append(token)
        scores.append(piece.score)
        kinds.append(kind)
    spare = rows - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + [f"<unused-row-{i}>" for i in range(spare)])
    writer.add_token_scores(scores + [0.0] * spare)
    writer.add_token_types(kinds + [types.UNUSED] * spare)
    writer.add_bos_token_id(tokenizer.start_token_id)
    writer.add_eos_token_id(tokenizer.end_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(model.trainer_spec.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    if tokenizer.end_of_turn_token_id is not None:
        writer.add_eot_token_id(tokenizer.end_of_turn_token_id)
        writer.add_chat_template(CHAT_TEMPLATE)


def _write_tensors(gguf: ModuleType, writer: Any, weights: dict[str, Any], dtype: str) -> None:
    """Writes the header with the info of all tensors, then converts and writes them one by one."""
    kinds = {name: _kind(gguf, name, weight.shape, dtype) for name, weight in weights.items()}
    for name, weight in weights.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[name]]
        size = math.prod(weight.shape) // block * block_bytes
        float32 = np.dtype("float32")  # overridden by raw_dtype
        writer.add_tensor_info(tensor_name(name), weight.shape, float32, size, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    sizes = {name: math.prod(weight.shape) for name, weight in weights.items()}
    with progress.bar("Saving", sum(sizes.values())) as advance:
        for name, weight in weights.items():
            array = weight.numpy()
            if array.ndim == 1:
                # This package stores w of the norm's scale (1 + w); llama.cpp stores the scale.
                encoded = 1.0 + array.astype("float32")
                _max_magnitude(name, encoded)
            else:
                encoded = _encode(gguf, name, array, kinds[name])
            writer.write_tensor_data(encoded)
            advance(sizes[name])


def _kind(gguf: ModuleType, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Returns the GGML type of one tensor in a file of `dtype`."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    if dtype == "q4_0" and name == "token_embedding":
        dtype = "q8_0"
    kind = kinds[dtype.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kinds.F16 if shape[-1] % block else kind


def _encode(gguf: ModuleType, name: str, array: np.ndarray, kind: Any) -> np.ndarray:
    """Encodes `array` `[out, in]` as the bytes of `kind`: uint8 `[out, bytes per row]`."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    encoded = np.empty((array.shape[0], array.shape[1] // block * block_bytes), "uint8")
    step = max(1, CHUNK_ELEMENTS // array.shape[1])
    for rows in (slice(start, start + step) for start in range(0, len(array), step)):
        values = np.ascontiguousarray(array[rows], "float32")
        largest = _max_magnitude(name, values)
        if largest > MAX_MAGNITUDES.get(kind.name, math.inf):
            raise ValueError(
                f"{name} holds {largest}, which exceeds float16: save with `dtype='bf16'`."
            )
        encoded[rows] = gguf.quants.quantize(values, kind).view("uint8")
    return encoded


def _max_magnitude(name: str, values: np.ndarray) -> float:
    """Returns the largest magnitude in `values`, which must all be finite."""
    largest = np.abs(values).max()
    if not np.isfinite(largest):  # NaN if any value is
        raise ValueError(
            f"{name} holds {largest}, so the model is unusable. Train or load it again."
        )
    return largest
