"""Settings of quantization: mode, group size and bits of each matrix.

Knows names and shapes of weights. Knows nothing about their values.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_gemma.checks import check_bool, check_integer, check_one_of

MODES = ("int8", "int4")

EMBEDDING = "token_embedding"
"""Name of the embedding, which is also the output head and can have its own number of bits."""

_FILE_KEYS = {"zero_points": "zeros"}  # fields with another name in files


@dataclasses.dataclass(frozen=True, init=False)
class QuantizationConfig:
    """Settings for the quantization of a model's matrices. Norms keep the model's dtype.

    `"int8"` has one scale per row. `"int4"` has one scale per group of `group_size` numbers of a
    row and, with `zero_points`, one zero point per group.

    Args:
        mode: `"int8"` or `"int4"`.
        group_size: Numbers of a row that share a scale (int4 only). Defaults to 32.
        zero_points: If True, groups have zero points (int4 only). Reduces the error and adds 6 %
            memory. Defaults to False.
        embedding: Mode of the embedding, `"int8"`, or `"int4"` with mode `"int4"`. Logits are
            most sensitive to this weight. Defaults to `"int8"`.
        zeros: Deprecated alias of `zero_points`, which is also an attribute. Overrides
            `zero_points` unless it is `None`.

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
    group_size: int
    zero_points: bool
    embedding: str

    def __init__(
        self,
        mode: str,
        group_size: int = 32,
        zero_points: bool = False,
        embedding: str = "int8",
        *,
        zeros: bool | None = None,
    ) -> None:
        zero_points = zero_points if zeros is None else zeros
        check_one_of("mode", mode, MODES)
        check_integer("group_size", group_size)
        check_bool("zero_points", zero_points)
        check_one_of("embedding", embedding, MODES)
        if mode == "int8" and (zero_points or embedding == "int4"):
            raise ValueError(
                "`zero_points` and `embedding='int4'` require mode='int4'. Received: mode='int8', "
                f"zero_points={zero_points}, embedding={embedding!r}"
            )
        values = (mode, int(group_size), zero_points, embedding)
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @property
    def zeros(self) -> bool:
        """Deprecated alias of `zero_points`."""
        return self.zero_points

    def bits(self, kind: str) -> int:
        """Returns the bits of a weight of `kind`, `"matrix"` or `"embedding"`."""
        return 4 if (self.embedding if kind == "embedding" else self.mode) == "int4" else 8

    def array_options(self, kind: str) -> tuple[int, int, bool]:
        """Returns bits, group size and `zero_points` of a weight of `kind`, as in `bits`."""
        bits = self.bits(kind)
        return bits, self.group_size, bits == 4 and self.zero_points

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
        zero_points = " with zero points" * self.zero_points
        return f"int4 in groups of {self.group_size}{zero_points}, embedding {self.embedding}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-compatible values. Files call `zero_points` `zeros`."""
        return {_FILE_KEYS.get(name, name): v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationConfig":
        """Inverse of `to_dict`. Also accepts `zero_points` instead of `zeros`.

        Raises:
            ValueError: If a field is unknown or `mode` is missing.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if "mode" not in values or set(values) - names - set(_FILE_KEYS.values()):
            raise ValueError(
                f"`quantization` requires `mode` and accepts {_or(sorted(names - {'mode'}))}. "
                f"Received: {dict(values)!r}"
            )
        return cls(**values)


def to_config(value: Any) -> QuantizationConfig | None:
    """Converts a `quantization` argument: `None`, a mode, a dictionary or a config."""
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
