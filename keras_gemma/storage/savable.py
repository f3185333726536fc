"""`save_to_hugging_face` and `save_to_gguf`, for a model with a `backbone` and a `preprocessor`."""

from pathlib import Path

from keras_gemma.storage.gguf_writer import save_to_gguf
from keras_gemma.storage.hugging_face_writer import save_to_hugging_face


class Savable:
    """A model that other programs can have; `save_to_preset` is `Presettable`'s."""

    def save_to_hugging_face(
        self, directory: str | Path, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a folder that transformers loads: configuration, tokenizer, safetensors.

        The files are written beside the folder and moved in when all are whole. Quantized weights
        are written as the numbers that they stand for, in the model's dtype.

        Args:
            directory: the folder; it is made, or the model in it replaced.
            max_shard_size: the size of a weights file, in bytes or as `"5GB"`.

        Raises:
            ValueError: no architecture of transformers computes this model, or the folder cannot
                be replaced.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_hugging_face("my_gemma")  # AutoModelForCausalLM.from_pretrained("my_gemma")
        ```
        """
        save_to_hugging_face(self, directory, max_shard_size)

    def save_to_gguf(self, path: str | Path, dtype: str = "bf16") -> None:
        """Write one file that llama.cpp loads: hyperparameters, vocabulary and weights.

        Needs the package `gguf`: `pip install "keras-gemma[gguf]"`. Quantized weights are written
        as the numbers that they stand for, rounded to `dtype`.

        Args:
            path: the file, ending in `.gguf`; it is replaced when the new one is whole.
            dtype: `"bf16"`, `"f16"`, `"q8_0"` or `"q4_0"`.

        Raises:
            ValueError: llama.cpp has no architecture that computes this model, or there is no
                vocabulary.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_gguf("my_gemma.gguf", dtype="q8_0")
        ```
        """
        save_to_gguf(self, path, dtype)
