"""Configuration of a Gemma model: its sizes, and everything derived from them.

Knows nothing about frameworks or files. `model/` builds layers from it, `storage/` reads and
writes it, and `generation/` sizes its caches with it.

The alphabet of every shape in this package:

    B batch    T query positions    S key positions    V vocabulary    L layers
    N query heads    K key/value heads    G = N / K    H head dim    D hidden    F feed forward
"""

import dataclasses
import math
from typing import Any, NamedTuple

from keras_gemma.checks import check_integer, check_number

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}

ROPE_THETA = 10_000.0
"""Base of the rotary frequencies of Gemma 1 and Gemma 2, and of Gemma 3's local layers."""

ROPE_THETA_GEMMA3 = 1_000_000.0
"""Base of the rotary frequencies of Gemma 3's global layers."""

PATTERN_GEMMA3 = 6
"""`sliding_window_pattern` of Gemma 3."""

FIXED_BY_KERAS_HUB = {
    "Gemma": {
        "use_query_key_norm": False,
        "sliding_window_pattern": 2,
        "local_rope_wavelength": ROPE_THETA,
        "global_rope_wavelength": ROPE_THETA,
        "local_rope_scaling_factor": 1.0,
        "global_rope_scaling_factor": 1.0,
    },
    "Gemma3": {
        "sliding_window_pattern": PATTERN_GEMMA3,
        "local_rope_wavelength": ROPE_THETA,
        "global_rope_wavelength": ROPE_THETA_GEMMA3,
    },
}
"""Fields of `GemmaConfig` that KerasHub's classes do not have, and their values, by family."""

GROUP_SIZE = 32
"""Default group size of 4-bit quantization: numbers that share a scale."""


class LayerKind(NamedTuple):
    """Properties in which layers of a model may differ, in addition to their weights."""

    window: int | None
    """Number of visible positions, including that of the query.

    `None` means all earlier positions.
    """
    rope_theta: float = ROPE_THETA
    """Base of the rotary frequencies."""
    rope_scaling: float = 1.0
    """Divisor of the positions before rotation (linear scaling)."""


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes and options of a Gemma model.

    Field names equal the arguments of `GemmaBackbone`. `intermediate_dim` is 2F, as in
    KerasHub; `feed_forward_dim` is F.

    Raises:
        ValueError: If a size is not positive, or sizes are inconsistent.

    Example:

    ```python
    from keras_gemma import GemmaConfig

    config = GemmaConfig(
        vocabulary_size=256000, num_layers=18, num_query_heads=8, num_key_value_heads=1,
        hidden_dim=2048, intermediate_dim=32768, head_dim=256,
    )
    config.parameter_count  # 2506172416
    ```
    """

    vocabulary_size: int
    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    hidden_dim: int
    intermediate_dim: int
    head_dim: int
    query_head_dim_normalize: bool = True
    use_post_ffw_norm: bool = False
    use_post_attention_norm: bool = False
    attention_logit_soft_cap: float | None = None
    final_logit_soft_cap: float | None = None
    use_sliding_window_attention: bool = False
    sliding_window_size: int = 4096
    layer_norm_epsilon: float = 1e-6
    dropout: float = 0.0
    use_query_key_norm: bool = False
    sliding_window_pattern: int = 2
    local_rope_wavelength: float = ROPE_THETA
    global_rope_wavelength: float = ROPE_THETA
    local_rope_scaling_factor: float = 1.0
    global_rope_scaling_factor: float = 1.0
    context_length: int = 8192
    """Maximum text length of training, in tokens. KerasHub has no such field."""

    def __post_init__(self) -> None:
        for name in (field.name for field in dataclasses.fields(self) if field.type is int):
            check_integer(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))  # NumPy integers are not JSON
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_query_heads` must be a multiple of `num_key_value_heads`, so that all "
                "key/value heads serve equally many query heads. Received: "
                f"num_query_heads={self.num_query_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.intermediate_dim % 2:
            raise ValueError(
                "`intermediate_dim` counts the gate and the up projection together, so it must "
                f"be even. Received: intermediate_dim={self.intermediate_dim}"
            )
        if self.head_dim % 2:
            raise ValueError(
                "`head_dim` must be even: rotary embeddings turn pairs of its elements. "
                f"Received: head_dim={self.head_dim}"
            )
        for name in ("attention_logit_soft_cap", "final_logit_soft_cap"):
            cap = getattr(self, name)
            if cap is not None:
                check_number(name, cap, "(0, inf)", "`None` disables soft capping.")
        for name in (
            "layer_norm_epsilon",
            "local_rope_wavelength",
            "global_rope_wavelength",
            "local_rope_scaling_factor",
            "global_rope_scaling_factor",
        ):
            check_number(name, getattr(self, name), "(0, inf)")
        check_number("dropout", self.dropout, "[0, 1)")

    @property
    def feed_forward_dim(self) -> int:
        """F, the inner width of the feed forward."""
        return self.intermediate_dim // 2

    @property
    def query_scale(self) -> float:
        """Factor of the queries: 1/sqrt(H), or 1/sqrt(D/N) for the 27B models."""
        if self.query_head_dim_normalize:
            return self.head_dim**-0.5
        return (self.hidden_dim / self.num_query_heads) ** -0.5

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings, before rounding to the activations' dtype."""
        return math.sqrt(self.hidden_dim)

    def is_local(self, layer: int) -> bool:
        """Returns True if `layer` (0-based) has a sliding window.

        The last layer of each `sliding_window_pattern` layers is global: every second layer of
        Gemma 2, and every sixth layer of Gemma 3.
        """
        return self.use_sliding_window_attention and in_local_part(
            layer, self.sliding_window_pattern
        )

    def layer_kind(self, layer: int) -> LayerKind:
        """Returns the kind of `layer` (0-based): its window, and its rotary base and scaling."""
        if self.is_local(layer):
            return LayerKind(
                self.sliding_window_size, self.local_rope_wavelength, self.local_rope_scaling_factor
            )
        return LayerKind(None, self.global_rope_wavelength, self.global_rope_scaling_factor)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all weights by name, in the order of the data.

        Matrices are `[out, in]`, so the tied embedding is `[V, D]` as the output head.
        """
        d, f = self.hidden_dim, self.feed_forward_dim
        queries = self.num_query_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"token_embedding": (self.vocabulary_size, d)}
        for i in range(self.num_layers):
            layer = f"layers.{i}"
            shapes[f"{layer}.pre_attention_norm"] = (d,)
            shapes[f"{layer}.query"] = (queries, d)
            shapes[f"{layer}.key"] = (keys, d)
            shapes[f"{layer}.value"] = (keys, d)
            if self.use_query_key_norm:
                shapes[f"{layer}.query_norm"] = (self.head_dim,)
                shapes[f"{layer}.key_norm"] = (self.head_dim,)
            shapes[f"{layer}.output"] = (d, queries)
            if self.use_post_attention_norm:
                shapes[f"{layer}.post_attention_norm"] = (d,)
            shapes[f"{layer}.pre_ffw_norm"] = (d,)
            shapes[f"{layer}.gate"] = (f, d)
            shapes[f"{layer}.up"] = (f, d)
            shapes[f"{layer}.down"] = (d, f)
            if self.use_post_ffw_norm:
                shapes[f"{layer}.post_ffw_norm"] = (d,)
        shapes["final_norm"] = (d,)
        return shapes

    @property
    def parameter_count(self) -> int:
        """Number of parameters; the tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.weight_shapes().values())

    def weight_bytes(self, dtype: str = "bfloat16", embedding: str = "int8") -> int:
        """Returns the bytes of the weights in `dtype`.

        `"int8"` and `"int4"` mean a bfloat16 model after `quantize` with default settings:
        bfloat16 norms, a float32 scale per 8-bit row and a bfloat16 scale per 4-bit group.
        `embedding` is the mode of the embedding, `"int4"` only in an int4 model.
        """
        if dtype not in ("int8", "int4"):
            return self.parameter_count * BYTES_PER_ELEMENT[dtype]
        mode_of = {"token_embedding": embedding}
        return sum(
            _quantized_bytes(shape, 4 if mode_of.get(name, dtype) == "int4" else 8)
            for name, shape in self.weight_shapes().items()
        )

    def cache_slots(self, layer: int, length: int) -> int:
        """Returns the number of cache slots of `layer` for a text of `length` tokens."""
        window = self.layer_kind(layer).window
        return length if window is None else min(length, window)

    def cache_bytes(self, batch: int, length: int, dtype: str = "bfloat16") -> int:
        """Returns the bytes of keys and values for `batch` texts of `length` tokens."""
        per_slot = 2 * self.num_key_value_heads * self.head_dim * BYTES_PER_ELEMENT[dtype]
        slots = sum(self.cache_slots(i, length) for i in range(self.num_layers))
        return int(batch * slots * per_slot)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary: the arguments of `GemmaBackbone`."""
        return dataclasses.asdict(self)

    @property
    def family(self) -> str:
        """Prefix of KerasHub's class names: `"Gemma"` for Gemma 1 and 2, or `"Gemma3"`."""
        return "Gemma3" if self.use_query_key_norm else "Gemma"

    @property
    def is_in_keras_hub(self) -> bool:
        """True if KerasHub's classes can express this model."""
        fixed = FIXED_BY_KERAS_HUB[self.family]
        return all(getattr(self, name) == value for name, value in fixed.items())

    def to_keras_hub(self) -> dict[str, Any]:
        """Returns the arguments of KerasHub's backbone. It has no `context_length`.

        `intermediate_dim` of Gemma 3 is F there.

        Raises:
            ValueError: If KerasHub cannot express this model.
        """
        fixed = FIXED_BY_KERAS_HUB[self.family]
        if not self.is_in_keras_hub:
            values = {name: getattr(self, name) for name in fixed}
            raise ValueError(
                f"KerasHub's {self.family}Backbone computes with {_listed(fixed)}, so it cannot "
                f"express this model. Received: {_listed(values)}"
            )
        left_out = {"context_length", *fixed}
        values = {name: value for name, value in self.to_dict().items() if name not in left_out}
        if self.family == "Gemma3":
            values["intermediate_dim"] = self.feed_forward_dim
            values |= {"image_size": None, "vision_encoder": None}
        return values

    @classmethod
    def from_keras_hub(cls, family: str, values: dict[str, Any]) -> "GemmaConfig":
        """Returns the config of the arguments of KerasHub's backbone of `family`."""
        for name in ("use_bidirectional_attention", "is_embedding_model"):
            if values.get(name):
                raise ValueError(
                    "Embedding models, whose attention is bidirectional, are not supported. "
                    f"Received: {name}={values[name]!r}"
                )
        values = {**FIXED_BY_KERAS_HUB[family], **values}
        if family == "Gemma3":
            defaults = {"use_query_key_norm": True, "sliding_window_size": 1024}
            values = defaults | values | {"intermediate_dim": 2 * values["intermediate_dim"]}
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GemmaConfig":
        """Returns the config with the fields in `values`; other keys are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def in_local_part(layer: int, pattern: int) -> bool:
    """Returns True if `layer` (0-based) is not the last of its `pattern` layers."""
    return layer % pattern < pattern - 1


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _quantized_bytes(shape: tuple[int, ...], bits: int) -> int:
    if len(shape) == 1:
        return shape[0] * BYTES_PER_ELEMENT["bfloat16"]
    out, length = shape
    if bits == 8:
        return out * (length + BYTES_PER_ELEMENT["float32"])
    return out * (length // 2 + length // GROUP_SIZE * BYTES_PER_ELEMENT["bfloat16"])
