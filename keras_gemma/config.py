"""The one description of a Gemma model: its sizes, and everything that follows from them.

Knows no framework and no file. `model/` builds layers from it, `storage/` reads and
writes it, `generation/` sizes its caches by it.

The alphabet of every shape in this package:

    B batch    T query positions    S key positions    V vocabulary    L layers
    N query heads    K key/value heads    G = N / K    H head dim    D hidden    F feed forward
"""

import dataclasses
import math
from typing import Any, NamedTuple

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}

ROPE_THETA = 10_000.0
"""Base of the rotary frequencies of Gemma 1 and Gemma 2."""

GROUP_SIZE = 32
"""Numbers that share a scale in 4 bits, unless a model is quantized otherwise."""


class LayerKind(NamedTuple):
    """Everything in which one layer of a model may differ from another, besides its weights."""

    window: int | None
    """Number of visible positions, including the own one. `None` means all earlier positions."""
    rope_theta: float = ROPE_THETA
    """Base of the rotary frequencies."""
    rope_scaling: float = 1.0
    """Divisor of the positions before rotation (linear scaling)."""


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """The sizes and switches of one Gemma model.

    Field names are those of `GemmaBackbone`'s arguments. `intermediate_dim` is 2F, as in
    KerasHub; `feed_forward_dim` is F.

    Raises:
        ValueError: a size is not positive, or two of them do not fit together.

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
    context_length: int = 8192
    """The longest text, in tokens, that the model was trained to read; unknown to KerasHub."""

    def __post_init__(self) -> None:
        for name in (
            "vocabulary_size",
            "num_layers",
            "num_query_heads",
            "num_key_value_heads",
            "hidden_dim",
            "intermediate_dim",
            "head_dim",
            "sliding_window_size",
            "context_length",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_query_heads` must be a multiple of `num_key_value_heads`, so that each "
                "key/value head serves as many query heads. Received: "
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
            if cap is not None and not cap > 0:
                raise ValueError(f"`{name}` must be positive, or None. Received: {name}={cap!r}")
        if not self.layer_norm_epsilon > 0:
            raise ValueError(
                "`layer_norm_epsilon` must be positive. "
                f"Received: layer_norm_epsilon={self.layer_norm_epsilon!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={self.dropout!r}")

    @property
    def feed_forward_dim(self) -> int:
        """F: the width between the two halves of the feed forward."""
        return self.intermediate_dim // 2

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by: 1/sqrt(H), or 1/sqrt(D/N) for the 27B models."""
        if self.query_head_dim_normalize:
            return self.head_dim**-0.5
        return (self.hidden_dim / self.num_query_heads) ** -0.5

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by, before rounding to the activations' dtype."""
        return math.sqrt(self.hidden_dim)

    def is_local(self, layer: int) -> bool:
        """Whether `layer` (0-based) sees the sliding window alone: the even ones of Gemma 2."""
        return self.use_sliding_window_attention and layer % 2 == 0

    def layer_kind(self, layer: int) -> LayerKind:
        """Returns the kind of `layer` (0-based): its window, and its rotary base and scaling."""
        return LayerKind(self.sliding_window_size if self.is_local(layer) else None)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model by its name, in the order of the data.

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
        """How many numbers the model holds; the tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.weight_shapes().values())

    def weight_bytes(self, dtype: str = "bfloat16") -> int:
        """Bytes of the weights in `dtype`.

        `"int8"` and `"int4"` are what `quantize` makes of a bfloat16 model unless told otherwise:
        the embedding in 8 bits, norms in bfloat16, a float32 scale for each row of 8 bits and a
        bfloat16 one for each group of 4.
        """
        if dtype not in ("int8", "int4"):
            return self.parameter_count * BYTES_PER_ELEMENT[dtype]
        return sum(
            _quantized_bytes(shape, 4 if dtype == "int4" and name != "token_embedding" else 8)
            for name, shape in self.weight_shapes().items()
        )

    def cache_slots(self, layer: int, length: int) -> int:
        """Positions that the cache of `layer` keeps for a text of `length` tokens."""
        window = self.layer_kind(layer).window
        return length if window is None else min(length, window)

    def cache_bytes(self, batch: int, length: int, dtype: str = "bfloat16") -> int:
        """Bytes of keys and values for `batch` texts of `length` tokens."""
        per_slot = 2 * self.num_key_value_heads * self.head_dim * BYTES_PER_ELEMENT[dtype]
        slots = sum(self.cache_slots(i, length) for i in range(self.num_layers))
        return int(batch * slots * per_slot)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary: `GemmaBackbone`'s arguments."""
        return dataclasses.asdict(self)

    def to_keras_hub(self) -> dict[str, Any]:
        """The arguments of KerasHub's `GemmaBackbone`: all but `context_length`."""
        return {name: value for name, value in self.to_dict().items() if name != "context_length"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GemmaConfig":
        """The config whose fields stand in `values`; other keys are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def _quantized_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Of a norm, or of a matrix in so many bits."""
    if len(shape) == 1:
        return shape[0] * BYTES_PER_ELEMENT["bfloat16"]
    out, length = shape
    if bits == 8:
        return out * (length + BYTES_PER_ELEMENT["float32"])
    return out * (length // 2 + length // GROUP_SIZE * BYTES_PER_ELEMENT["bfloat16"])
