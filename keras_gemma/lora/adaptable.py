"""What the two models, with and without a head, share where they have adapters (LoRA)."""

from collections.abc import Iterable
from typing import Any

from keras_gemma.lora.config import read_lora
from keras_gemma.model.quantizable import start_anew, trained_by

NAME = "default"
"""Of an adapter, where nothing is said."""


class Adaptable:
    """A base of Keras models with `adapters`, those of their backbone."""

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
        """Freeze the model, and train products of low rank beside some of its matrices (LoRA).

        Beside a matrix W, quantized or not, stands `alpha / rank * B A`, where B begins as 0: at
        first nothing changes. `fit` then trains A and B alone. Enabled under another name, a
        second adapter stands beside the first, of which one is on at a time.

        While an adapter is on, `save_to_preset`, `save_to_hugging_face` and `save_to_gguf` write
        the model with it merged; `save_lora` writes the adapter alone, and a `.keras` file
        keeps base and adapters apart.

        Args:
            rank: rows of A and columns of B.
            alpha: what the adapter counts, times `rank`.
            targets: kinds of matrices, `"query"`, `"key"`, `"value"`, `"output"`, `"gate"`,
                `"up"`, `"down"`, or as peft calls them, `"q_proj"`; patterns of names, as
                `"layers.[0-3].*"`; or `"all-linear"`.
            dropout: the share of a matrix's input that A does not see in training.
            name: of the adapter.
            use_rslora: count `alpha / sqrt(rank)` instead, which suits large ranks.
            dtype: of A and B. Training needs float32; products are in the model's own dtype.
            seed: of A; by default that of `keras.utils.set_random_seed`.

        Raises:
            ValueError: a name that is taken, a number out of range, an unknown target, the
                embedding as a target, or an adapter that is merged.

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
        self.adapters.begin(name, seed)

    @property
    def lora_adapters(self) -> list[str]:
        """The names of the adapters."""
        return list(self.adapters.known)

    @property
    def active_adapter(self) -> str | None:
        """The adapter that is on, merged or not; None for none."""
        return self.adapters.active

    def set_adapter(self, name: str | None) -> None:
        """Put another adapter on; None is the base alone. Nothing is loaded or copied.

        The adapter that is on is what `fit` trains. An optimizer that has trained another begins
        anew with the settings that it has.

        Args:
            name: one of `lora_adapters`, or None.

        Raises:
            ValueError: an unknown name, or an adapter is merged.

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
        self.adapters.choose(name)

    def delete_adapter(self, name: str) -> None:
        """Let an adapter go. Without any, the model is trained as it was before there were.

        Raises:
            ValueError: an unknown name, or an adapter is merged.

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
        """Add the adapter that is on into the matrices, so that it costs nothing any more.

        Logits stay the same but for the rounding of the merged matrices. What is saved while an
        adapter is on is merged in any case.

        Args:
            keep_base: keep a copy of the matrices that change, for `unmerge_lora`. With False
                there is no way back, and no adapter is left: the model is a plain one.

        Raises:
            ValueError: no adapter is on, one is merged, the model is quantized, or the adapter
                holds numbers that are not finite.

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
        """Put back the matrices as they were before `merge_lora`, number for number.

        Raises:
            ValueError: no adapter is merged.
        """
        self.adapters.unmerge()

    def make_train_function(self, force: bool = False) -> Any:
        """As `keras.Model.make_train_function`, with an optimizer for the adapter that is on."""
        renew_optimizer(self)
        return super().make_train_function(force)


def renew_optimizer(model: Any) -> None:
    """Where the optimizer's variables are those of others than `model` trains now, begin anew."""
    known, trained = trained_by(model.optimizer), model.trainable_variables
    if known and [id(variable) for variable in known] != [id(variable) for variable in trained]:
        start_anew(model.optimizer)
        model.optimizer.build(trained)
