"""KerasHub-compatible LoRA methods of the backbone."""

from collections.abc import Iterable
from pathlib import Path

from keras_gemma.lora.adaptable import Adaptable


class AdaptableBackbone(Adaptable):
    """Mixin of `GemmaBackbone` with the LoRA methods of KerasHub's backbones."""

    def enable_lora(
        self,
        rank: int,
        target_layer_names: str | Iterable[str] | None = None,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        name: str = "default",
        use_rslora: bool = False,
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        """Freezes the base model and adds a trainable LoRA adapter.

        Follows KerasHub's method, so `alpha` defaults to `rank`. All other arguments are the same
        as in `GemmaCausalLM.enable_lora`.

        Args:
            rank: Rank of the update.
            target_layer_names: Same as `targets` in `GemmaCausalLM.enable_lora`. `None` adapts
                queries and values.

        Raises:
            ValueError: Same as in `GemmaCausalLM.enable_lora`.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.backbone.enable_lora(rank=4)
        lm.fit(["First Citizen:\\nSpeak, speak."], batch_size=1)
        ```
        """
        targets = ("query", "value") if target_layer_names is None else target_layer_names
        options = {"name": name, "use_rslora": use_rslora, "dtype": dtype, "seed": seed}
        super().enable_lora(rank, rank if alpha is None else alpha, targets, dropout, **options)

    def save_lora_weights(self, filepath: str | Path) -> None:
        """Writes the active adapter in KerasHub's format.

        `GemmaCausalLM.save_lora` writes peft's format. KerasHub's rank may be larger, because
        KerasHub stores one A per head and one rank for all matrices.

        Args:
            filepath: Path that ends in `.lora.h5`.

        Raises:
            ValueError: If no adapter is active or the path does not end in `.lora.h5`.
        """
        from keras_gemma.storage.adapters.keras_hub_lora import save_lora_weights

        save_lora_weights(self, filepath)

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
