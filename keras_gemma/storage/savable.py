"""Export methods: Hugging Face, GGUF and PEFT formats."""

from pathlib import Path

from keras_gemma.lora.adaptable import NAME
from keras_gemma.storage.adapters.peft import load_lora, save_lora
from keras_gemma.storage.formats import save_as
from keras_gemma.storage.gguf.writer import save_to_gguf


class Savable:
    """Mixin that saves a model in other libraries' formats."""

    def save_to_hugging_face(
        self, directory: str | Path, max_shard_size: int | str = "5GB"
    ) -> None:
        """Writes a folder that transformers loads: configuration, tokenizer, safetensors.

        The files are written next to the folder and moved into it when all are complete. Quantized
        weights are written dequantized, in the model's dtype.

        Args:
            directory: The folder, created if it does not exist. A model in it is replaced.
            max_shard_size: Maximum size of a weights file, in bytes or as `"5GB"`.

        Raises:
            ValueError: If no architecture of transformers computes this model, or the folder cannot
                be replaced.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_hugging_face("my_gemma")  # AutoModelForCausalLM.from_pretrained("my_gemma")
        ```
        """
        save_as(self, "hugging_face", directory, max_shard_size)

    def save_to_gguf(self, path: str | Path, dtype: str = "bf16") -> None:
        """Writes one file that llama.cpp loads: hyperparameters, vocabulary and weights.

        Needs the package `gguf`: `pip install "keras-gemma[gguf]"`. Quantized weights are
        dequantized and rounded to `dtype`.

        Args:
            path: The file, ending in `.gguf`. An existing file is replaced when the new one is
                complete.
            dtype: `"bf16"`, `"f16"`, `"q8_0"` or `"q4_0"`.

        Raises:
            ValueError: If no architecture of llama.cpp computes this model, or there is no
                vocabulary.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_gguf("my_gemma.gguf", dtype="q8_0")
        ```
        """
        save_to_gguf(self, path, dtype)

    def save_lora(
        self, directory: str | Path, name: str | None = None, base_model: str | None = None
    ) -> None:
        """Writes an adapter in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`.

        PEFT loads the adapter onto the base model. To write the base model, call
        `set_adapter(None)` and then `save_to_hugging_face`.

        Args:
            directory: The folder, created if it does not exist. An adapter in it is replaced.
            name: Name of the adapter. Defaults to the active adapter.
            base_model: Base model to record for PEFT, such as `"google/gemma-2-2b"`.

        Raises:
            ValueError: If there is no such adapter, its numbers are not all finite, or the folder
                cannot be written.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4)
        lm.save_lora("my_adapter")
        lm.delete_adapter("default")
        lm.load_lora("my_adapter")
        ```
        """
        save_lora(self.backbone, directory, name, base_model)

    def load_lora(self, directory: str | Path, name: str = NAME, dtype: str = "float32") -> None:
        """Loads an adapter that `save_lora` or PEFT wrote, and activates it.

        Args:
            directory: The folder with the adapter's two files.
            name: Name of the adapter in this model.
            dtype: Dtype of the adapter's variables.

        Raises:
            FileNotFoundError: If the folder or a file in it is missing.
            ValueError: If the name is taken, the adapter does not fit the model (all such tensors
                are listed), its numbers are not all finite, or it is of an unsupported kind (DoRA,
                biases, whole modules).

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4)
        lm.save_lora("my_adapter")
        lm.load_lora("my_adapter", name="again")
        ```
        """
        load_lora(self.backbone, directory, name, dtype)
