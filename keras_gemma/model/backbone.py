"""The backbone: token ids to hidden states, through every block."""

import inspect
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras

from keras_gemma.backend import keras_internals
from keras_gemma.checks import check_argument_names
from keras_gemma.config import ROPE_THETA, GemmaConfig
from keras_gemma.lora.adapters import DEFAULT_NAME, Adapters
from keras_gemma.lora.config import DEFAULT_TARGETS
from keras_gemma.model.decoder_block import GemmaDecoderBlock
from keras_gemma.model.embedding import ReversibleEmbedding, scale_embeddings
from keras_gemma.model.layout_map import gemma_layout_map
from keras_gemma.model.matrix import MatrixLayer
from keras_gemma.model.normalization import RMSNormalization
from keras_gemma.model.quantize import check_policy, freeze_floats, quantize, read_mode
from keras_gemma.model.trainable import TrainableModel, reset_training
from keras_gemma.model.weights import NamedWeight, QuantizedWeight
from keras_gemma.presettable import Presettable
from keras_gemma.quantization import QuantizationConfig, join, to_config


def check_layer_arguments(cls: type, arguments: dict[str, Any]) -> None:
    """Raises a ValueError for unknown or misspelled arguments, which Keras would ignore."""
    names = [name for name in inspect.signature(cls).parameters if name not in arguments]
    check_argument_names(cls.__name__, arguments, [*names[:-1], "name", "trainable"], ValueError)


def check_range(policy: Any, config: GemmaConfig) -> None:
    """Raises a ValueError for float16 if activations of the model exceed its range.

    The residual stream of Gemma 3 270M reaches 104,061. The largest float16 number is 65,504.
    """
    if config.use_query_key_norm and "float16" in (policy.compute_dtype, policy.variable_dtype):
        raise ValueError(
            "`dtype` must be 'bfloat16' or 'float32' for a model with query and key norms "
            "(Gemma 3), because its activations exceed the range of float16. A GPU without "
            "bfloat16 units, such as a T4, emulates bfloat16, which may be slow: take 'float32' "
            f"there if it fits into memory. Received: dtype={policy.name!r}"
        )


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaBackbone(Presettable, TrainableModel):
    """Gemma without its head: `{"token_ids", "padding_mask"}`, both `[B, T]`, -> `[B, T, D]`.

    The mask is 0 at padding and 1 elsewhere. If several documents are packed into a row, the mask
    numbers them from 1, and attention stays within each document.

    Args:
        vocabulary_size: V.
        num_layers: L.
        num_query_heads: N.
        num_key_value_heads: K, a divisor of N.
        hidden_dim: D.
        intermediate_dim: 2F, the combined width of the gate and up projections.
        head_dim: H.
        query_head_dim_normalize: If True, queries are scaled by 1/sqrt(H), else by 1/sqrt(D/N).
        use_post_ffw_norm, use_post_attention_norm: If True, the output of the half block is
            normalized before the residual addition (Gemma 2).
        attention_logit_soft_cap, final_logit_soft_cap: `c` in `c * tanh(x / c)`.
            `None` disables capping.
        use_sliding_window_attention: If True, local layers attend only to the last
            `sliding_window_size` positions.
        layer_norm_epsilon: Epsilon of every norm.
        dropout: Dropout rate for the output of each half block in training.
        use_query_key_norm: If True, each head of queries and keys is normalized (Gemma 3).
        sliding_window_pattern: The last of this many layers is global, the others are local.
            Defaults to 2; 6 in Gemma 3.
        local_rope_wavelength, global_rope_wavelength: Base of the rotary frequencies of local and
            global layers. Default to 10,000; Gemma 3's global layers have 1,000,000.
        local_rope_scaling_factor, global_rope_scaling_factor: Divisor of the positions in local
            and global layers. Default to 1; 8 in the global layers of Gemma 3 from 4B on.
        dtype: Dtype or dtype policy, such as `"bfloat16"` or `"mixed_bfloat16"`. Gemma 3 exceeds
            the range of float16.
        context_length: Maximum number of tokens in prompt and answer together. No weight depends
            on it.
        quantization: `"int8"`, `"int4"`, a `QuantizationConfig` or its dictionary. Quantized
            matrices are zero until they are loaded. All weights are frozen. `None` keeps floating
            point; `quantize` can convert the model later. `from_preset` of a GGUF file also
            accepts `"as_stored"`, which keeps the numbers of the file exactly.

    Raises:
        ValueError: If the sizes are inconsistent, or incompatible with the quantization or dtype.

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

    preset: str | None = None
    """Preset that `from_preset` has read: a name, a handle or an absolute path."""

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
        quantization: Any = None,
        use_query_key_norm: bool = False,
        sliding_window_pattern: int = 2,
        local_rope_wavelength: float = ROPE_THETA,
        global_rope_wavelength: float = ROPE_THETA,
        local_rope_scaling_factor: float = 1.0,
        global_rope_scaling_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        config = GemmaConfig.from_dict(locals())  # the arguments with the names of its fields
        check_layer_arguments(type(self), kwargs)
        policy = keras.dtype_policies.get(dtype)
        check_policy(policy)
        check_range(policy, config)
        quantization = to_config(quantization)
        if quantization is not None:
            quantization.check_shapes(config.weight_shapes())

        def of(name: str) -> QuantizationConfig | None:
            return quantization and quantization.within(name)

        embedding = ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
            final_logit_soft_cap,
            of("token_embedding"),
            dtype=policy,
            name="token_embedding",
        )
        blocks = [
            GemmaDecoderBlock(
                config, layer, of(f"layers.{layer}"), dtype=policy, name=f"decoder_block_{layer}"
            )
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
        self.wrapping_models: weakref.WeakSet = weakref.WeakSet()
        self.adapters = Adapters(self)
        keras_internals.restore_quantize(self)
        if quantization is not None:
            freeze_floats(self)

    @classmethod
    def arguments_of(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the constructor arguments for fields of `GemmaConfig`. Keeps other keys."""
        return values

    @classmethod
    def config_of(cls, arguments: dict[str, Any]) -> GemmaConfig:
        """Returns the config of constructor arguments."""
        return GemmaConfig.from_dict(arguments)

    @staticmethod
    def get_layout_map(
        device_mesh: Any,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
    ) -> Any:
        """Returns a layout map for `keras.distribution.ModelParallel`, which needs JAX.

        Maps have KerasHub's axes, so published ones apply too. Quantized weights and adapters are
        not sharded.

        Args:
            device_mesh: A `keras.distribution.DeviceMesh` with both axes.
            model_parallel_dim_name: Axis of the mesh that shards the heads and hidden sizes.
            data_parallel_dim_name: Axis of the mesh that shards batches.

        Example:

        ```python
        import keras_gemma  # selects the backend, so it comes before keras
        from keras import distribution

        mesh = distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
        layout_map = keras_gemma.GemmaBackbone.get_layout_map(mesh)
        parallel = distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
        # with parallel.scope(): load, generate and fit
        ```
        """
        return gemma_layout_map(device_mesh, model_parallel_dim_name, data_parallel_dim_name)

    @property
    def quantization(self) -> QuantizationConfig | None:
        """Quantization of the matrices, or `None` in floating point."""
        layers = self.weight_layers().items()
        return join({n: one.quantization for n, one in layers if isinstance(one, MatrixLayer)})

    @property
    def rematerialize(self) -> bool:
        """True if training recomputes each block for its gradient instead of keeping activations.

        Training takes about a third longer and needs the memory of one block at a time. Set it
        before `fit`. It cannot be combined with dropout.
        """
        return self.transformer_layers[0].rematerialize

    @rematerialize.setter
    def rematerialize(self, value: bool) -> None:
        blocks = self.transformer_layers
        if value and (self.config.dropout or any(block.lora_dropout for block in blocks)):
            raise ValueError(
                "Blocks with dropout cannot be rematerialized, because dropout would differ when "
                f"they are recomputed. Disable one of the two. Received: rematerialize={value!r}"
            )
        for block in blocks:
            block.rematerialize = bool(value)
        reset_training(self)

    @property
    def token_embedding(self) -> ReversibleEmbedding:
        """The tied embedding."""
        return self.get_layer("token_embedding")

    @property
    def transformer_layers(self) -> list[GemmaDecoderBlock]:
        """The blocks, first to last."""
        return [self.get_layer(f"decoder_block_{i}") for i in range(self.config.num_layers)]

    @transformer_layers.setter
    def transformer_layers(self, value: Any) -> None:
        raise AttributeError(
            "`transformer_layers` cannot be replaced, because programs are compiled from the "
            "weights of the blocks. To read or change activations, pass hooks to "
            "`GemmaCausalLM.score`, such as hooks={'block.3.residual.after': lambda x, name: x}."
        )

    @property
    def layer_norm(self) -> RMSNormalization:
        """The final norm."""
        return self.get_layer("final_normalization")

    def __getattr__(self, name: str) -> Any:
        # Constructor arguments are attributes as well: `backbone.hidden_dim`.
        if name in GemmaConfig.__dataclass_fields__ and "config" in self.__dict__:
            return getattr(self.__dict__["config"], name)
        parent = getattr(super(), "__getattr__", None)
        if parent is not None:
            return parent(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def tensors(self) -> dict[str, Any]:
        """Returns all packed weights in the compute dtype, as arguments of the functions."""
        return {
            "layers": [block.tensors() for block in self.transformer_layers],
            "head": {
                "token_embedding": self.token_embedding.tensor,
                "final_norm": self.layer_norm.tensor,
            },
        }

    def weight_layers(self) -> dict[str, MatrixLayer | RMSNormalization]:
        """Returns the layer of each weight, by the weight's name in `weight_shapes`."""
        layers: dict[str, Any] = {"token_embedding": self.token_embedding}
        for i, block in enumerate(self.transformer_layers):
            layers |= {f"layers.{i}.{part}": one for part, one in block.weight_layers().items()}
        return {**layers, "final_norm": self.layer_norm}

    def named_weights(self) -> dict[str, NamedWeight | QuantizedWeight]:
        """Returns all weights, readable and assignable, by their names in `weight_shapes`."""
        shapes = self.config.weight_shapes()
        layers = self.weight_layers()
        return {name: _named(name, layer, shapes[name]) for name, layer in layers.items()}

    def quantize(
        self,
        mode: Any = None,
        group_size: int = 32,
        zero_points: bool = False,
        embedding: str = "int8",
        *,
        config: Any = None,
        calibration: Any = None,
        zeros: bool | None = None,
    ) -> None:
        """Quantizes the matrices to 8 or 4 bits in place. Same as `GemmaCausalLM.quantize`.

        Args:
            mode, group_size, zero_points, embedding, config, zeros: Same as in
                `GemmaCausalLM.quantize`.
            calibration: Lists of token ids. A backbone has no tokenizer for texts.

        Raises:
            ValueError, TypeError: Same as in `GemmaCausalLM.quantize`.
        """
        config, data = read_mode(mode, config, group_size, zero_points, embedding, zeros)
        quantize(self, config, data if calibration is None else calibration)

    def enable_lora(
        self,
        rank: int = 8,
        targets: str | Iterable[str] | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        name: str = DEFAULT_NAME,
        use_rslora: bool = False,
        dtype: str = "float32",
        seed: int | None = None,
        target_layer_names: str | Iterable[str] | None = None,
    ) -> None:
        """Freezes the base model and adds a trainable LoRA adapter.

        Arguments and errors are the same as in `GemmaCausalLM.enable_lora`, but `alpha` defaults
        to `rank`, as in KerasHub.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.backbone.enable_lora(rank=4)
        lm.fit(["First Citizen:\\nSpeak, speak."], batch_size=1)
        ```
        """
        targets = targets if target_layer_names is None else target_layer_names
        alpha = rank if alpha is None else alpha
        self.adapters.enable(name, seed, rank, targets, alpha, dropout, use_rslora, dtype)

    def default_lora_layer_names(self) -> list[str]:
        """Returns the matrices that `enable_lora` adapts by default."""
        return list(DEFAULT_TARGETS)

    get_lora_target_names = default_lora_layer_names
    """Name of `default_lora_layer_names` in earlier versions of KerasHub."""

    @property
    def lora_adapters(self) -> list[str]:
        """Names of all adapters."""
        return list(self.adapters.configs)

    @property
    def active_adapter(self) -> str | None:
        """Name of the active adapter, merged or not, or `None`."""
        return self.adapters.active

    def set_adapter(self, name: str | None) -> None:
        """Activates an adapter. Same as `GemmaCausalLM.set_adapter`."""
        self.adapters.activate(name)

    def delete_adapter(self, name: str) -> None:
        """Deletes an adapter. Same as `GemmaCausalLM.delete_adapter`."""
        self.adapters.delete(name)

    def merge_lora(self, keep_base: bool = True) -> None:
        """Merges the active adapter into the base. Same as `GemmaCausalLM.merge_lora`."""
        self.adapters.merge(keep_base)

    def unmerge_lora(self) -> None:
        """Undoes `merge_lora`. Same as `GemmaCausalLM.unmerge_lora`."""
        self.adapters.unmerge()

    def save_lora_weights(self, filepath: str | Path, *, overwrite: bool = False) -> None:
        """Writes the active adapter in KerasHub's format.

        `GemmaCausalLM.save_lora` writes PEFT's format. KerasHub's rank may be larger, because
        KerasHub stores one A per head and one rank for all matrices.

        Args:
            filepath: Path that ends in `.lora.h5`.
            overwrite: If True, replaces an earlier file of an adapter.

        Raises:
            ValueError: If no adapter is active, the path exists, or it does not end in `.lora.h5`.
        """
        from keras_gemma.storage.adapters.keras_hub_lora import save_lora_weights

        save_lora_weights(self, filepath, overwrite)

    def load_lora_weights(self, filepath: str | Path) -> None:
        """Loads and activates an adapter that KerasHub's `save_lora_weights` wrote.

        The adapter is named `"default"` and replaces an adapter of that name. KerasHub stores one
        A per head, so the rank here is KerasHub's rank times the number of heads.

        Args:
            filepath: Path that ends in `.lora.h5`.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file does not hold a KerasHub adapter, the adapter belongs to
                another model, or an adapter is merged.

        Example:

        ```python
        import keras_gemma

        backbone = keras_gemma.GemmaBackbone.from_preset("gemma_tiny_en")
        backbone.enable_lora(rank=4)
        backbone.save_lora_weights("my_adapter.lora.h5")
        backbone.load_lora_weights("my_adapter.lora.h5")
        ```
        """
        from keras_gemma.storage.adapters.keras_hub_lora import load_lora_weights

        load_lora_weights(self, filepath)

    def get_config(self) -> dict[str, Any]:
        config = {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            **self.arguments_of(self.config.to_dict()),
            "quantization": self.quantization and self.quantization.to_dict(),
        }
        adapters = self.adapters.to_dict()
        return config if adapters is None else {**config, "lora": adapters}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "GemmaBackbone":
        config = dict(config)
        trainable, adapters = config.pop("trainable", True), config.pop("lora", None)
        backbone = cls(**config)
        if not trainable:  # True would unfreeze the quantized weights
            backbone.trainable = False
        backbone.adapters.restore(adapters)
        return backbone


def _named(name: str, layer: Any, shape: tuple[int, ...]) -> NamedWeight | QuantizedWeight:
    if isinstance(layer, RMSNormalization):
        return NamedWeight(layer.scale, shape, "norm")
    if layer.quantization is not None:
        return QuantizedWeight(name, layer, shape, layer.kind)
    return NamedWeight(layer.variables_of_matrix, shape, layer.kind, layer.adapted)
