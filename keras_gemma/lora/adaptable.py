"""LoRA methods that `GemmaBackbone` and `GemmaCausalLM` share."""

from collections.abc import Iterable
from typing import Any

from keras_gemma.lora.config import read_lora
from keras_gemma.model.quantizable import start_anew, trained_by

NAME = "default"
"""Default adapter name."""


class Adaptable:
    """Mixin of LoRA methods for a Keras model with `adapters`, the `Adapters` of its backbone."""

    def enable_lora(
        self,
        rank: int = 8,
        alpha: float = 16,
        targets: str | Iterable[str] = ("query", "value"),
        dropout: float = 0.0,
        *,
        name: str = NAME,
        use_rslora: bool = False,
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        """Freezes the base model and adds a trainable LoRA adapter.

        The adapter adds `alpha / rank * B A` to each target matrix W, quantized or not. B is
        initialized to zero, so the output does not change until `fit` trains A and B. Call
        `enable_lora` again with another `name` to add another adapter. One adapter is active at a
        time.

        While an adapter is active, `save_to_preset`, `save_to_hugging_face` and `save_to_gguf`
        write the merged model. `save_lora` writes only the adapter, and a `.keras` file stores the
        base model and its adapters separately.

        Args:
            rank: Rank of the update: rows of A and columns of B. Defaults to 8.
            alpha: Scale of the update, divided by `rank`. Defaults to 16.
            targets: Matrices to adapt: kinds (`"query"`, `"key"`, `"value"`, `"output"`, `"gate"`,
                `"up"`, `"down"`), their peft names such as `"q_proj"`, name patterns such as
                `"layers.[0-3].*"`, or `"all-linear"`. Defaults to `("query", "value")`.
            dropout: Dropout rate of the input of A in training. Defaults to 0.
            name: Adapter name. Defaults to `"default"`.
            use_rslora: If True, scales by `alpha / sqrt(rank)`, which suits large ranks.
            dtype: Dtype of A and B. Products use the model's compute dtype. Defaults to
                `"float32"`, which training needs.
            seed: Random seed for A. `None` uses the seed of `keras.utils.set_random_seed`.

        Raises:
            ValueError: If the name is already in use, a number is out of range, a target is
                unknown or is the embedding, or an adapter is merged.

        Example:

        ```python
        import keras
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en", quantization="int4")
        lm.enable_lora(rank=8, targets="all-linear")
        lm.compile(optimizer=keras.optimizers.AdamW(1e-4))
        lm.fit(["First Citizen:\\nSpeak, speak."], batch_size=1)
        lm.save_lora("my_adapter")
        ```
        """
        config = self.adapters.backbone.config
        lora = read_lora(config, rank, alpha, targets, dropout, use_rslora, dtype)
        self.adapters.check_name(name)
        self.adapters.add(name, lora)
        self.adapters.initialize(name, seed)

    @property
    def lora_adapters(self) -> list[str]:
        """Names of all adapters."""
        return list(self.adapters.configs)

    @property
    def active_adapter(self) -> str | None:
        """Name of the active adapter, merged or not, or `None`."""
        return self.adapters.active

    def set_adapter(self, name: str | None) -> None:
        """Activates an adapter. Loads and copies nothing.

        `fit` trains the active adapter. An optimizer that has trained another adapter is reset and
        keeps its settings.

        Args:
            name: One of `lora_adapters`. `None` deactivates all adapters.

        Raises:
            ValueError: If the name is unknown or an adapter is merged.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4, name="verse")
        lm.enable_lora(rank=4, name="prose")
        lm.set_adapter("verse")
        lm.set_adapter(None)
        ```
        """
        self.adapters.activate(name)

    def delete_adapter(self, name: str) -> None:
        """Deletes an adapter.

        Deleting the last adapter makes the base model trainable again, as it was before.

        Args:
            name: One of `lora_adapters`.

        Raises:
            ValueError: If the name is unknown or an adapter is merged.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4)
        lm.delete_adapter("default")
        ```
        """
        self.adapters.delete(name)

    def merge_lora(self, keep_base: bool = True) -> None:
        """Merges the active adapter into the base model, which removes its runtime cost.

        Logits stay the same up to the rounding of the merged matrices. Saving does not need this
        method: the `save_to_*` methods merge the active adapter themselves.

        Args:
            keep_base: If True, keeps a copy of the changed matrices for `unmerge_lora`. If False,
                the merge is permanent and all adapters are deleted. Defaults to True.

        Raises:
            ValueError: If no adapter is active, an adapter is merged, the model is quantized, or
                the adapter contains NaN or infinity.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4)
        lm.merge_lora()
        lm.unmerge_lora()
        ```
        """
        self.adapters.merge(keep_base)

    def unmerge_lora(self) -> None:
        """Restores the exact matrices from before `merge_lora`.

        Raises:
            ValueError: If no adapter is merged.
        """
        self.adapters.unmerge()

    def make_train_function(self, force: bool = False) -> Any:
        """Same as `keras.Model.make_train_function`, after `renew_optimizer`."""
        renew_optimizer(self)
        return super().make_train_function(force)


def renew_optimizer(model: Any) -> None:
    """Rebuilds the optimizer if it was built for variables that `model` no longer trains."""
    built, trained = trained_by(model.optimizer), model.trainable_variables
    if built and [id(variable) for variable in built] != [id(variable) for variable in trained]:
        start_anew(model.optimizer)
        model.optimizer.build(trained)
