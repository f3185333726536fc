"""The backbone: ids to hidden states, through every block."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.model.decoder_block import GemmaDecoderBlock
from keras_gemma.model.embedding import ReversibleEmbedding, scale_embeddings
from keras_gemma.model.normalization import RMSNormalization
from keras_gemma.presettable import Presettable


@dataclasses.dataclass(frozen=True)
class NamedWeight:
    """One weight as files know it: matrices `[out, in]`, whatever the stored layout."""

    variable: keras.Variable
    shape: tuple[int, ...]
    kind: str

    @property
    def dtype(self) -> str:
        return self.variable.dtype

    def pack(self, array: np.ndarray) -> np.ndarray:
        """`array`, of `shape`, in the variable's dtype and layout; in its own memory if it can."""
        if tuple(array.shape) != self.shape:
            raise ValueError(
                f"{self.variable.path} takes an array of shape {self.shape}. "
                f"Received: array.shape={tuple(array.shape)}"
            )
        return backend.pack(array, self.kind, self.dtype)

    def take(self, packed: np.ndarray) -> None:
        """Store what `pack` gave; the variable may live on in its memory."""
        backend.assign(self.variable, packed)

    def assign(self, array: np.ndarray) -> None:
        """Store a copy of `array`, of `shape`, in the variable's dtype and layout."""
        self.take(self.pack(np.array(array)))

    def numpy(self) -> np.ndarray:
        """The weight as a NumPy array of `shape`."""
        return backend.unpack(ops.convert_to_numpy(self.variable.value), self.shape)


def check_layer_arguments(cls: type, arguments: dict[str, Any]) -> None:
    """Raise a ValueError where `arguments` are not those that every Keras model takes.

    Keras itself would pass over a misspelt one in silence.
    """
    unknown = sorted(set(arguments) - {"name", "trainable"})
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no argument {unknown[0]!r}. Look for a misspelling. "
            f"Received: {', '.join(f'{name}={arguments[name]!r}' for name in unknown)}"
        )


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaBackbone(Presettable, keras.Model):
    """Gemma without its head: `{"token_ids", "padding_mask"}`, both `[B, T]`, -> `[B, T, D]`.

    Args:
        vocabulary_size: V.
        num_layers: L.
        num_query_heads: N.
        num_key_value_heads: K; it divides N.
        hidden_dim: D.
        intermediate_dim: 2F: the gate and the up projection together.
        head_dim: H.
        query_head_dim_normalize: scale queries by 1/sqrt(H); False is 1/sqrt(D/N).
        use_post_ffw_norm, use_post_attention_norm: normalise what a half block adds (Gemma 2).
        attention_logit_soft_cap, final_logit_soft_cap: `c` of `c * tanh(x / c)`, or None.
        use_sliding_window_attention: even layers see the last `sliding_window_size` positions.
        layer_norm_epsilon: of every norm.
        dropout: share of what each half block adds that is dropped in training.
        dtype: a dtype or policy, such as `"bfloat16"` or `"mixed_bfloat16"`.
        context_length: tokens that prompt and answer together may have; it shapes no weight.

    Raises:
        ValueError: sizes that do not fit together.

    Example:

    ```python
    import numpy as np
    from keras_gemma import GemmaBackbone

    backbone = GemmaBackbone(
        vocabulary_size=512, num_layers=2, num_query_heads=4, num_key_value_heads=1,
        hidden_dim=64, intermediate_dim=256, head_dim=16,
    )
    ids = np.array([[2, 7, 9]])
    backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}).shape  # (1, 3, 64)
    ```
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int,
        num_key_value_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        head_dim: int,
        query_head_dim_normalize: bool = True,
        use_post_ffw_norm: bool = False,
        use_post_attention_norm: bool = False,
        attention_logit_soft_cap: float | None = None,
        final_logit_soft_cap: float | None = None,
        use_sliding_window_attention: bool = False,
        sliding_window_size: int = 4096,
        layer_norm_epsilon: float = 1e-6,
        dropout: float = 0.0,
        dtype: Any = None,
        context_length: int = 8192,
        **kwargs: Any,
    ) -> None:
        config = GemmaConfig(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            head_dim=head_dim,
            query_head_dim_normalize=query_head_dim_normalize,
            use_post_ffw_norm=use_post_ffw_norm,
            use_post_attention_norm=use_post_attention_norm,
            attention_logit_soft_cap=attention_logit_soft_cap,
            final_logit_soft_cap=final_logit_soft_cap,
            use_sliding_window_attention=use_sliding_window_attention,
            sliding_window_size=sliding_window_size,
            layer_norm_epsilon=layer_norm_epsilon,
            dropout=dropout,
            context_length=context_length,
        )
        check_layer_arguments(type(self), kwargs)
        policy = keras.dtype_policies.get(dtype)
        embedding = ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
            final_logit_soft_cap,
            dtype=policy,
            name="token_embedding",
        )
        blocks = [
            GemmaDecoderBlock(config, layer, dtype=policy, name=f"decoder_block_{layer}")
            for layer in range(num_layers)
        ]
        final_norm = RMSNormalization(layer_norm_epsilon, dtype=policy, name="final_normalization")

        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        x = scale_embeddings(embedding(token_ids), config.embedding_scale)
        for block in blocks:
            x = block(x, padding_mask=padding_mask)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=final_norm(x),
            **kwargs,
        )
        self.dtype_policy = policy
        self.config = config

    @property
    def token_embedding(self) -> ReversibleEmbedding:
        """The tied embedding."""
        return self.get_layer("token_embedding")

    @property
    def transformer_layers(self) -> list[GemmaDecoderBlock]:
        """The blocks, first to last."""
        return [self.get_layer(f"decoder_block_{i}") for i in range(self.config.num_layers)]

    @property
    def layer_norm(self) -> RMSNormalization:
        """The final norm."""
        return self.get_layer("final_normalization")

    def __getattr__(self, name: str) -> Any:
        # The constructor's arguments are attributes too: `backbone.hidden_dim`.
        if name in GemmaConfig.__dataclass_fields__ and "config" in self.__dict__:
            return getattr(self.__dict__["config"], name)
        parent = getattr(super(), "__getattr__", None)
        if parent is not None:
            return parent(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def tensors(self) -> dict[str, Any]:
        """All packed weights in the compute dtype, for functions that take them as arguments."""
        return {
            "layers": [block.tensors() for block in self.transformer_layers],
            "head": {
                "token_embedding": self.token_embedding.tensor,
                "final_norm": self.layer_norm.tensor,
            },
        }

    def named_weights(self) -> dict[str, NamedWeight]:
        """Every weight by its name in `GemmaConfig.weight_shapes`, to read and to assign."""
        shapes = self.config.weight_shapes()
        weights = {
            "token_embedding": NamedWeight(
                self.token_embedding.embeddings, shapes["token_embedding"], "embedding"
            )
        }
        for i, block in enumerate(self.transformer_layers):
            for part, holder in block.holders().items():
                name = f"layers.{i}.{part}"
                if isinstance(holder, RMSNormalization):
                    weights[name] = NamedWeight(holder.scale, shapes[name], "norm")
                else:
                    weights[name] = NamedWeight(holder.kernel, shapes[name], "matrix")
        weights["final_norm"] = NamedWeight(self.layer_norm.scale, shapes["final_norm"], "norm")
        return weights

    def quantize(self, mode: Any = None, **kwargs: Any) -> None:
        """Not available: raises a ValueError instead of leaving the weights as they are."""
        raise ValueError(
            "This version computes with 16 and 32 bits alone: load with `dtype='bfloat16'`. "
            f"Received: mode={mode!r}"
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            **self.config.to_dict(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "GemmaBackbone":
        config = dict(config)
        trainable = config.pop("trainable", True)
        backbone = cls(**config)
        backbone.trainable = trainable
        return backbone
