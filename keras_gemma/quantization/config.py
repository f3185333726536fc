"""Settings of quantization: mode, group size and bits of each matrix.

Knows names and shapes of weights. Knows nothing about their values.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_gemma.backend import Layout
from keras_gemma.checks import check_bool, check_integer, check_one_of

MODES = ("int8", "int4")
AS_STORED = "as_stored"

STORED_TYPES = {
    "Q4_0": Layout(4, 32, scale_dtype="float16"),
    "Q4_1": Layout(4, 32, minimums=True, scale_dtype="float16"),
    "Q5_0": Layout(8, 32, scale_dtype="float16"),
    "Q8_0": Layout(8, 32, scale_dtype="float16"),
    "Q4_K": Layout(4, 32, minimums=True, scale_dtype="float32"),
    "Q5_K": Layout(8, 32, minimums=True, scale_dtype="float32"),
    "Q6_K": Layout(8, 16, scale_dtype="float32"),
}
"""Layout that holds the numbers of each ggml type exactly.

The scales of a K type are products of a float16 and 6 or 8 bits, which only float32 holds.
"""

EMBEDDING = "token_embedding"
"""Name of the embedding, which is also the output head and can have its own number of bits."""

_FILE_KEYS = {"zero_points": "zeros"}  # fields with another name in files


@dataclasses.dataclass(frozen=True, init=False)
class QuantizationConfig:
    """Settings for the quantization of a model's matrices. Norms keep the model's dtype.

    `"int8"` has one scale per row. `"int4"` has one scale per group of `group_size` numbers of a
    row and, with `zero_points`, one zero point per group. `"as_stored"` keeps the numbers of a
    GGUF file exactly, each matrix in its own type.

    Args:
        mode: `"int8"`, `"int4"` or `"as_stored"`.
        group_size: Numbers of a row that share a scale (int4 only). Defaults to 32.
        zero_points: If True, groups have zero points (int4 only). Reduces the error and adds 6 %
            memory. Defaults to False.
        embedding: Mode of the embedding, `"int8"`, or `"int4"` with mode `"int4"`. Logits are
            most sensitive to this weight. Defaults to `"int8"`.
        types: ggml type of each weight by name (as_stored only), such as
            `{"layers.0.query": "Q4_K"}`. Other weights are not quantized. `from_preset` reads
            the types from the file. Defaults to `None`.
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
    types: dict[str, str] | None = dataclasses.field(hash=False)

    def __init__(
        self,
        mode: str,
        group_size: int = 32,
        zero_points: bool = False,
        embedding: str = "int8",
        types: Mapping[str, str] | None = None,
        *,
        zeros: bool | None = None,
    ) -> None:
        zero_points = zero_points if zeros is None else zeros
        check_one_of("mode", mode, (*MODES, AS_STORED))
        check_integer("group_size", group_size)
        check_bool("zero_points", zero_points)
        check_one_of("embedding", embedding, MODES)
        if mode == "int8" and (zero_points or embedding == "int4"):
            raise ValueError(
                "`zero_points` and `embedding='int4'` require mode='int4'. Received: mode='int8', "
                f"zero_points={zero_points}, embedding={embedding!r}"
            )
        if mode == AS_STORED and (group_size, zero_points, embedding) != (32, False, "int8"):
            raise ValueError(
                "`group_size`, `zero_points` and `embedding` do not apply to mode='as_stored', "
                f"which keeps the groups of the file. Received: group_size={group_size}, "
                f"zero_points={zero_points}, embedding={embedding!r}"
            )
        values = (mode, int(group_size), zero_points, embedding, _check_types(mode, types))
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @property
    def zeros(self) -> bool:
        """Deprecated alias of `zero_points`."""
        return self.zero_points

    def layout(self, kind: str) -> Layout:
        """Returns the layout of a weight of `kind`, `"matrix"` or `"embedding"`.

        In mode `"as_stored"`, the config must be that of one weight, as `within` returns it.
        """
        if self.mode == AS_STORED:
            return STORED_TYPES[self.types[""]]
        if (self.embedding if kind == "embedding" else self.mode) == "int8":
            return Layout(8, None)
        return Layout(4, self.group_size, self.zero_points)

    def within(self, name: str) -> "QuantizationConfig | None":
        """Returns the config of the weight or the block `name`; `None` if nothing is quantized.

        Types in the result have names relative to `name`. Only they depend on the weight.
        """
        if self.mode != AS_STORED:
            return self
        types = {
            key.removeprefix(name).removeprefix("."): type
            for key, type in (self.types or {}).items()
            if f"{key}.".startswith(f"{name}.")
        }
        return dataclasses.replace(self, types=types) if types else None

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that groups fill the rows of all int4 matrices.

        Args:
            shapes: Shapes of all weights by name, as in `GemmaConfig.weight_shapes()`.

        Raises:
            ValueError: If `group_size` does not divide a row length. Names each such length.
        """
        if self.mode == AS_STORED:
            self._check_stored_shapes(shapes)
            return
        lengths: dict[int, str] = {}
        for name, shape in shapes.items():
            kind = "embedding" if name == EMBEDDING else "matrix"
            odd = shape[-1] % self.group_size or shape[-1] % 2
            if len(shape) == 2 and self.layout(kind).bits == 4 and odd:
                lengths.setdefault(shape[-1], name)
        if lengths:
            invalid = ", ".join(f"{length} ({name})" for length, name in lengths.items())
            raise ValueError(
                "`group_size` must divide the length of every row, and lengths must be even. "
                f"Received: group_size={self.group_size}, and rows of {invalid}"
            )

    def _check_stored_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if not self.types:
            raise ValueError(
                "`quantization='as_stored'` keeps the numbers of a GGUF file, so it needs one: "
                "`from_preset('model.gguf', quantization='as_stored')`. Choose 'int8' or 'int4' "
                "for other models."
            )
        for name, type in self.types.items():
            shape = shapes.get(name, ())
            if len(shape) != 2 or shape[1] % STORED_TYPES[type].group_size:
                raise ValueError(
                    f"`types` must have the names of matrices, with rows of whole groups of "
                    f"{STORED_TYPES[type].group_size} numbers for {type}. "
                    f"Received: {name!r}, of shape {shape or 'unknown'}"
                )

    def describe(self) -> str:
        """Returns a short description, such as "int8, one scale per row"."""
        if self.mode == AS_STORED:
            return f"as stored in {', '.join(sorted(set((self.types or {}).values())))}"
        if self.mode == "int8":
            return "int8, one scale per row"
        zero_points = " with zero points" * self.zero_points
        return f"int4 in groups of {self.group_size}{zero_points}, embedding {self.embedding}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-compatible values. Files call `zero_points` `zeros`."""
        if self.mode == AS_STORED:
            return {"mode": self.mode, "types": dict(self.types or {})}
        values = dataclasses.asdict(self)
        del values["types"]
        return {_FILE_KEYS.get(name, name): value for name, value in values.items()}

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


def join(parts: Mapping[str, QuantizationConfig | None]) -> QuantizationConfig | None:
    """Returns the config of a model or block from those of its parts. Inverse of `within`."""
    configs = {name: config for name, config in parts.items() if config is not None}
    first = next(iter(configs.values()), None)
    if first is None or first.mode != AS_STORED:
        return first
    types = {
        f"{name}.{key}".removesuffix("."): type
        for name, config in configs.items()
        for key, type in config.types.items()
    }
    return QuantizationConfig(AS_STORED, types=types)


def _check_types(mode: str, types: Any) -> dict[str, str] | None:
    if types is None:
        return None
    if mode != AS_STORED:
        raise ValueError(f"`types` requires mode='as_stored'. Received: mode={mode!r}")
    if not isinstance(types, Mapping):
        raise TypeError(f"`types` must be a dictionary or None. Received: types={types!r:.100}")
    for name, type in types.items():
        if not isinstance(type, str) or type not in STORED_TYPES:
            raise ValueError(
                f"`types` must contain {', '.join(STORED_TYPES)}. Received: {name!r}: {type!r:.100}"
            )
    return dict(types)


def to_config(value: Any) -> QuantizationConfig | None:
    """Converts a `quantization` argument: `None`, a mode, a dictionary or a config."""
    if value is None or isinstance(value, QuantizationConfig):
        return value
    if isinstance(value, str):
        check_one_of("quantization", value, (*MODES, AS_STORED))
        return QuantizationConfig(value)
    if isinstance(value, Mapping):
        return QuantizationConfig.from_dict(value)
    raise TypeError(
        f"`quantization` must be {_or((*MODES, AS_STORED))}, a QuantizationConfig, or None. "
        f"Received: {value!r}"
    )


def _or(names: Any) -> str:
    return " or ".join(repr(name) for name in names)
