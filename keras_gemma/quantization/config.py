"""What 8 and 4 bits are to mean for a model: the mode, its groups, and which matrix has which.

Knows the names and shapes of weights; no numbers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

MODES = ("int8", "int4")

EMBEDDING = "token_embedding"
"""The weight that is both the lookup of ids and the head, and so may have bits of its own."""


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How the matrices of a model are quantized. Norms keep the model's dtype.

    In `"int8"` a row has one scale. In `"int4"` each `group_size` numbers of a row have one and,
    with `zeros`, a zero point too.

    Raises:
        ValueError: an unknown mode, or settings that do not fit it.

    Example:

    ```python
    import keras_gemma

    four = keras_gemma.QuantizationConfig("int4", group_size=32, embedding="int4")
    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en", quantization=four)
    ```
    """

    mode: str
    group_size: int = 32
    """Of 4 bits: how many numbers of a row share a scale."""
    zeros: bool = False
    """Of 4 bits: whether groups have a zero point; a smaller error, and 6 % more memory."""
    embedding: str = "int8"
    """Bits of the embedding, on which logits depend most: `"int8"`, or with that mode `"int4"`."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be {_or(MODES)}. Received: mode={self.mode!r}")
        if type(self.group_size) is not int or self.group_size < 1:
            raise ValueError(
                f"`group_size` must be a positive integer. Received: group_size={self.group_size!r}"
            )
        if not isinstance(self.zeros, bool):
            raise ValueError(f"`zeros` must be True or False. Received: zeros={self.zeros!r}")
        if self.embedding not in MODES:
            raise ValueError(
                f"`embedding` must be {_or(MODES)}. Received: embedding={self.embedding!r}"
            )
        if self.mode == "int8" and (self.zeros or self.embedding == "int4"):
            raise ValueError(
                "`zeros` and `embedding='int4'` belong to mode='int4'. Received: mode='int8', "
                f"zeros={self.zeros}, embedding={self.embedding!r}"
            )

    def bits(self, kind: str) -> int:
        """Bits of a weight of `kind`, `"matrix"` or `"embedding"`."""
        return 4 if (self.embedding if kind == "embedding" else self.mode) == "int4" else 8

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise where the groups do not fill the rows of a matrix.

        Args:
            shapes: of all weights by their names, as `GemmaConfig.weight_shapes()`.

        Raises:
            ValueError: rows of a length that `group_size` does not divide; each is named.
        """
        lengths: dict[int, str] = {}
        for name, shape in shapes.items():
            kind = "embedding" if name == EMBEDDING else "matrix"
            odd = shape[-1] % self.group_size or shape[-1] % 2
            if len(shape) == 2 and self.bits(kind) == 4 and odd:
                lengths.setdefault(shape[-1], name)
        if lengths:
            wrong = ", ".join(f"{length} ({name})" for length, name in lengths.items())
            raise ValueError(
                "`group_size` must divide the length of every row, an even number. Received: "
                f"group_size={self.group_size}, and rows of {wrong}"
            )

    def describe(self) -> str:
        """In a few words, for people."""
        if self.mode == "int8":
            return "int8, a scale a row"
        zeros = " with zero points" * self.zeros
        return f"int4 in groups of {self.group_size}{zeros}, embedding {self.embedding}"

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationConfig":
        """The way back.

        Raises:
            ValueError: fields that it does not have, or no `mode`.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if "mode" not in values or set(values) - names:
            raise ValueError(
                f"`quantization` takes `mode` and, where needed, {_or(sorted(names - {'mode'}))}. "
                f"Received: {dict(values)!r}"
            )
        return cls(**values)


def to_config(value: Any) -> QuantizationConfig | None:
    """What a `quantization` argument means: None, a mode, a dictionary, or the config itself.

    Raises:
        ValueError: an unknown mode or setting.
        TypeError: something else.
    """
    if value is None or isinstance(value, QuantizationConfig):
        return value
    if isinstance(value, str):
        return QuantizationConfig(value)
    if isinstance(value, Mapping):
        return QuantizationConfig.from_dict(value)
    raise TypeError(
        f"`quantization` must be {_or(MODES)}, a QuantizationConfig, or None. Received: {value!r}"
    )


def _or(names: Any) -> str:
    return " or ".join(repr(name) for name in names)
