"""The method `export` of a language model."""

from pathlib import Path
from typing import Any

from keras_gemma.export import export


class Exportable:
    """Mixin that exports a model with a backbone and a preprocessor."""

    def export(
        self,
        filepath: str | Path,
        format: str = "tf_saved_model",
        *,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        """Exports the model to a folder that runs without Keras and without this package.

        A SavedModel maps strings to strings: its graph holds the tokenizer, the chat template,
        the KV cache, sampling and the decoding loop. Defaults for generation settings are taken
        from `compile()`. Exporting and running it need the packages tensorflow and
        tensorflow-text: `pip install "keras-gemma[tensorflow]"`.

        A program of `"torch"`, `"jax"` or `"onnx"` maps token ids and a KV cache to logits and
        the updated cache. The caller writes the decoding loop, as in the folder
        `examples/exported`.

        If a format needs another backend than the current one, a subprocess exports the model.
        If the export fails, an existing export at `filepath` is unchanged.

        Args:
            filepath: Path of the folder. It appears only when the export is complete.
            format: `"tf_saved_model"`, `"torch"`, `"jax"` or `"onnx"`.
            overwrite: If True, replaces an existing export. Other files and folders are never
                replaced.
            **options: Options of the format. `"torch"` and `"onnx"` have none.

                `"tf_saved_model"`:

                - `max_new_tokens`: Default of the served model. The value passed to `compile()`
                  by default, or 256.
                - `max_batch_size`: Maximum number of texts in a call. No limit by default.
                - `quantization`: Same as in `from_preset`, but only for the export.

                `"jax"`:

                - `batch_size`: Batch size of every call. `None` allows any batch size. 1 by
                  default.

        Raises:
            ValueError: If the format is unknown, the path exists, the model has no preprocessor,
                an option is out of range, the format does not support a setting of `compile()`,
                or an active adapter is not merged.
            TypeError: If the format does not have an option.
            ImportError: If packages that the format needs are not installed.
            OSError: If the disk is too small.
            RuntimeError: If the subprocess failed.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.export("served_gemma", max_new_tokens=40)
        ```
        """
        self.adapters.check_exportable()
        export(self, filepath, format, overwrite, **options)
