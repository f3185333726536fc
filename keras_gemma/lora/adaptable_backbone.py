"""Adapters of a backbone by the names and in the files of KerasHub."""

from collections.abc import Iterable
from pathlib import Path

from keras_gemma.lora.adaptable import Adaptable


class AdaptableBackbone(Adaptable):
    """A base of the model without a head."""

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
        """Freeze the model, and train products of low rank beside some of its matrices.

        As KerasHub's, so `alpha` is `rank` by default. `GemmaCausalLM.enable_lora` says what the
        other arguments are.

        Args:
            rank: of the products.
            target_layer_names: the `targets` there; by default queries and values.

        Raises:
            ValueError: see there.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.backbone.enable_lora(rank=4)
        lm.fit(["First Citizen:\\nSpeak, speak."], batch_size=1)
        ```
        """
        targets = ("query", "value") if target_layer_names is None else target_layer_names
        how = {"name": name, "use_rslora": use_rslora, "dtype": dtype, "seed": seed}
        super().enable_lora(rank, rank if alpha is None else alpha, targets, dropout, **how)

    def save_lora_weights(self, filepath: str | Path) -> None:
        """Write the adapter that is on in KerasHub's format; `GemmaCausalLM.save_lora` is peft's.

        KerasHub has one A for each head, and one rank for all matrices: its rank is larger.

        Args:
            filepath: ends in `.lora.h5`.

        Raises:
            ValueError: no adapter is on, or another ending.
        """
        from keras_gemma.storage.adapters.keras_hub_lora import save_lora_weights

        save_lora_weights(self, filepath)

    def load_lora_weights(self, filepath: str | Path) -> None:
        """Read an adapter that KerasHub's `save_lora_weights` wrote, and put it on.

        It is called "default" and takes the place of one of that name. KerasHub has one A for each
        head, so here its rank is that for each head times their number.

        Args:
            filepath: ends in `.lora.h5`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no file of KerasHub's adapters, one of another model, or an adapter is
                merged.

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
