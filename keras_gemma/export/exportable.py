"""A model of text to text that can be exported."""

from pathlib import Path
from typing import Any

from keras_gemma.export import export


class Exportable:
    """A model with a backbone, and a preprocessor or None."""

    def export(
        self,
        filepath: str | Path,
        format: str = "tf_saved_model",
        *,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        """Write a folder that runs without Keras and without this package.

        A SavedModel takes strings and gives strings: tokenizer, prompt, cache, the loop over
        tokens and sampling are in its graph. What `compile` has set, its functions do where a call
        says nothing. It needs the packages tensorflow and tensorflow-text, here and where it runs:
        `pip install "keras-gemma[tensorflow]"`; on JAX and PyTorch a second process makes it.

        A program of `"torch"`, `"jax"` or `"onnx"` takes ids and a cache and gives logits and the
        cache, for a loop of the caller's, as in the folder `examples/exported`. PyTorch or JAX
        makes it, where need be in a second process.

        Args:
            filepath: the folder; it takes its place when it is whole.
            format: `"tf_saved_model"`, `"torch"`, `"jax"` or `"onnx"`.
            overwrite: replace the export that is there; what is no export is never replaced.
            **options: of `"tf_saved_model"`: `max_new_tokens`, where a call does not say; by
                default that of `compile`, else 256. `max_batch_size`, the most texts at a time;
                by default there is no limit. `quantization`, as of `from_preset`, for the export
                alone. Of `"jax"`: `batch_size`, the rows of every call, 1 by default; None for
                any number. The others have none.

        Raises:
            ValueError: an unknown format; a path that exists; no preprocessor; options out of
                range; a model that was compiled with what the format has not; an adapter that is
                on and not merged.
            TypeError: an option that the format does not have.
            ImportError: what makes the format is not installed; the text says how to.
            OSError: no room on the disk.
            RuntimeError: the second process failed, with what it said. Whatever is raised, also by
                TensorFlow while it writes, what was there before is as it was.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.export("served_gemma", max_new_tokens=40)
        ```
        """
        self.adapters.check_exportable()
        export(self, filepath, format, overwrite, **options)
