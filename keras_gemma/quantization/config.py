"""Settings of quantization: mode, group size and bits of each matrix.

Knows names and shapes of weights. Knows nothing about their values.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

MODES = ("int8", "int4")

EMBEDDING = "token_embedding"
"""Name of the embedding, which is also the output head and can have its own number of bits."""


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Settings for the quantization of a model's matrices. Norms keep the model's dtype.

    `"int8"` has one scale per row. `"int4"` has one scale per group of `group_size` numbers of a
    row and, with `zeros`, one zero point per group.

    Args:
        mode: `"int8"` or `"int4"`.
        group_size: Numbers of a row that share a scale (int4 only). Defaults to 32.
        zeros: If True, groups have zero points (int4 only). Reduces the error and adds 6 % memory.
            Defaults to False.
        embedding: Mode of the embedding, `"int8"`, or `"int4"` with mode `"int4"`. Logits are
            most sensitive to this weight. Defaults to `"int8"`.

    Raises:
        ValueError: If the mode is unknown or the settings do not match it.

    Example:

    ```python
    import keras_gemma

    four = keras_gemma.QuantizationConfig("int4", group_size=32, embedding="int4")
    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en", quantization=four)
    ```
    """

    mode: str
    group_size: int = 32
    zeros: bool = False
    embedding: str = "int8"

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
                "`zeros` and `embedding='int4'` require mode='int4'. Received: mode='int8', "
                f"zeros={self.zeros}, embedding={self.embedding!r}"
            )

    def bits(self, kind: str) -> int:
        """Returns the bits of a weight of `kind`, `"matrix"` or `"embedding"`."""
        return 4 if (self.embedding if kind == "embedding" else self.mode) == "int4" else 8

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that groups fill the rows of all int4 matrices.

        Args:
            shapes: Shapes of all weights by name, as in `GemmaConfig.weight_shapes()`.

        Raises:
            ValueError: If `group_size` does not divide a row length. Names each such length.
        """
        lengths: dict[int, str] = {}
        for name, shape in shapes.items():
            kind = "embedding" if name == EMBEDDING else "matrix"
            odd = shape[-1] % self.group_size or shape[-1] % 2
            if len(shape) == 2 and self.bits(kind) == 4 and odd:
                lengths.setdefault(shape[-1], name)
        if lengths:
            invalid = ", ".join(f"{length} ({name})" for length, name in lengths.items())
            raise ValueError(
                "`group_size` must divide the length of every row, and lengths must be even. "
                f"Received: group_size={self.group_size}, and rows of {invalid}"
            )

    def describe(self) -> str:
        """Returns a short description, such as "int8, one scale per row"."""
        if self.mode == "int8":
            return "int8, one scale per row"
        zeros = " with zero points" * self.zeros
        return f"int4 in groups of {self.group_size}{zeros}, embedding {self.embedding}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-compatible values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationConfig":
        """Inverse of `to_dict`.

        Raises:
            ValueError: If a field is unknown or `mode` is missing.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if "mode" not in values or set(values) - names:
            raise ValueError(
                f"`quantization` requires `mode` and accepts {_or(sorted(names - {'mode'}))}. "
                f"Received: {dict(values)!r}"
            )
        return cls(**values)


def to_config(value: Any) -> QuantizationConfig | None:
    """Converts a `quantization` argument: `None`, a mode, a dictionary or a config.

    Raises:
        ValueError: If a mode or setting is unknown.
        TypeError: If the argument has another type.
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
