"""A model for a command: which bits it is loaded in so that it fits, and why.

Imports Keras; the command has chosen the backend before.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from keras_gemma import backend, catalogue, progress
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.cli.options import Dtype, Fit, Quantization
from keras_gemma.config import GROUP_SIZE, GemmaConfig
from keras_gemma.quantization import QuantizationConfig
from keras_gemma.storage.adapters.peft import find_adapter
from keras_gemma.storage.formats import format_of
from keras_gemma.storage.hub.locate import resolve

QUANTIZATION = {
    Fit.EXACT: None,
    Fit.SPEED: QuantizationConfig("int8"),
    Fit.MEMORY: QuantizationConfig("int4"),
    Fit.MEMORY_EXTREME: QuantizationConfig("int4", embedding="int4"),
}
"""In the order that `auto` tries."""

WHILE_LOADING = 1.15
"""Of the weights, the most that is taken while they are read."""

BESIDE = 0.3e9
"""Bytes for what is compiled, and all that is small."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a model is loaded."""

    arguments: dict[str, Any]
    """Of `from_preset`."""
    reason: str
    """In words, for people."""
    plain: bool
    """Whether it is as everybody expects."""


def load(
    choice: Choice, model: str, silent: bool = False, lora: Path | None = None
) -> GemmaCausalLM:
    """The model, with the adapter `lora` on; with `silent` no bar is shown.

    Raises:
        FileNotFoundError: no adapter is in the folder `lora`.
        ValueError: it is none of this model.
    """
    if lora is not None:
        find_adapter(lora)  # before the weights are read
    if silent:
        progress.PATIENCE = math.inf
    lm = GemmaCausalLM.from_preset(model, **choice.arguments)
    if lora is not None:
        lm.load_lora(lora)
    return lm


def choose(
    model: str, fit: Fit, dtype: Dtype | None, quantization: Quantization | None = None
) -> Choice:
    """How to load `model`.

    Raises:
        ValueError: there is no such model, or `auto` finds that none of its forms fits.
    """
    given: dict[str, Any] = {"dtype": dtype and dtype.value}
    if quantization is not None:
        given["quantization"] = quantization.value
        return Choice(given, f"{quantization.value}, as you chose", True)
    if fit is not Fit.AUTO:
        if fit is not Fit.EXACT:
            given["quantization"] = QUANTIZATION[fit]
        return Choice(given, f"{fit.value}, as you chose", True)
    folder = resolve(model, text=False, weights=False)
    described = format_of(folder).read_backbone(folder)
    listed = catalogue.find(model)
    if described.get("quantization") is not None:
        return Choice(given, "quantized as it is stored", True)
    config = listed.config if listed else GemmaConfig.from_dict(described)
    stored = given["dtype"] or stored_dtype(model)
    free = backend.free_memory()
    if free is None:
        return Choice(given, "exact, for nobody says how much memory is free", True)
    needs = {fit: needed(config, fit, stored) for fit in QUANTIZATION}
    for fit, bits in QUANTIZATION.items():
        if needs[fit] <= free:
            if bits is not None:
                given["quantization"] = bits
            return Choice(given, _reason(needs, fit, free), fit is Fit.EXACT)
    raise ValueError(
        f"{model} does not fit: even memory_extreme takes {_size(needs[Fit.MEMORY_EXTREME])} while "
        f"it is loaded, and {_size(free)} are free. Choose a smaller --model, or a --preset of "
        "your own to try it nevertheless."
    )


def stored_dtype(model: str) -> str:
    """The dtype of a model's weights where they are stored."""
    listed = catalogue.find(model)
    if listed and listed.dtype:
        return listed.dtype
    folder = resolve(model, text=False, weights=False)
    return str(format_of(folder).read_backbone(folder).get("dtype") or "float32")


def needed(config: GemmaConfig, fit: Fit, dtype: str) -> int:
    """Bytes that a model takes while it is loaded, and with one text of its whole context."""
    bits = QUANTIZATION[fit]
    weights = config.weight_bytes(dtype if bits is None else bits.mode)
    if bits is not None and bits.embedding == "int4" and bits.mode == "int4":
        # Half a byte less each, and a bfloat16 scale a group for a float32 one a row.
        row = config.hidden_dim // 2 + 4 - 2 * config.hidden_dim // GROUP_SIZE
        weights -= config.vocabulary_size * row
    cache = config.cache_bytes(1, config.context_length, dtype)
    return int(WHILE_LOADING * weights + cache + BESIDE)


def _reason(needs: dict[Fit, int], chosen: Fit, free: int) -> str:
    forms = list(needs)
    before = [f"{fit.value} would take {_size(needs[fit])}" for fit in forms[: forms.index(chosen)]]
    takes = f"{chosen.value}, which takes up to {_size(needs[chosen])} of {_size(free)} free"
    return "; ".join([takes, *before])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
