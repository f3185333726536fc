"""`from_preset` and `save_to_preset`, for every class that a preset can hold.

The classes live on the lower floors and the reading and writing of files lives above them, so
`storage/` hands its readers in here when it is imported, and nothing below imports it.
"""

from pathlib import Path
from typing import Any

from keras_gemma import catalogue


class _PublishedPresets:
    """The value of `presets`, which a class has without an object of it."""

    def __get__(self, instance: Any, owner: type) -> dict[str, dict[str, Any]]:
        return {name: preset.describe() for name, preset in catalogue.presets().items()}


class Presettable:
    """A class with a place in a preset folder."""

    presets = _PublishedPresets()
    """The built-in names and what they stand for, in KerasHub's shape.

    `{name: {"metadata": {"description", "params", "path", "context_length", "license",
    "license_url"}, "kaggle_handle": ..., "hugging_face_handle": ...}}`; the handles are None for
    what comes with the package.

    Example:

    ```python
    import keras_gemma

    gemma = keras_gemma.models.GemmaCausalLM.presets["gemma2_2b_en"]
    gemma["metadata"]["params"]  # 2614341888
    gemma["kaggle_handle"]  # "kaggle://keras/gemma2/keras/gemma2_2b_en/2"
    ```
    """

    @classmethod
    def from_preset(
        cls,
        preset: str | Path,
        load_weights: bool = True,
        dtype: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The object that a preset describes.

        Args:
            preset: a built-in name (`"gemma_tiny_en"`, or another one of `presets`), a
                directory that holds a Keras preset or a Hugging Face checkpoint, or a handle:
                `kaggle://owner/model/framework/variation[/version]`,
                `hf://owner/model[@revision]`, or `hf://` and a built-in name for its twin on
                Hugging Face. What is not on this machine yet is downloaded, and no more of it
                than the class needs. A built-in name wins over a folder of that name, with a
                warning: write `./name` for the folder.
            load_weights: False leaves a model's weights as initialised.
            dtype: of a model, such as `"bfloat16"`; None keeps what a Keras preset says.
            **kwargs: replace what the preset says of these arguments.

        Raises:
            ValueError: no such preset, a download that failed, or files that do not fit
                together; the text says which, and what to do.
            FileNotFoundError: a directory or a file in it is missing.
            TypeError: an argument of another type.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en", dtype="bfloat16")
        ```
        """
        from keras_gemma.storage.presets import load

        return load(cls, preset, load_weights, dtype, **kwargs)

    def save_to_preset(self, preset_dir: str | Path, **kwargs: Any) -> None:
        """Write this object to `preset_dir`, in the format that KerasHub reads too.

        The files are written beside the folder and moved in when all are whole. Should the machine
        stop in that moment, the earlier files lie whole beside it, in a hidden folder such as
        `.my_gemma.k3x9/old`.

        Args:
            preset_dir: the folder; it is made, or the model in it replaced.
            **kwargs: models take `max_shard_size`, bytes or a text such as `"10GB"`, the default:
                larger weights are split into files of at most this size.

        Raises:
            ValueError: an address, a file, a place that cannot be written, or a part of a model
                into a Hugging Face checkpoint.
            TypeError: `preset_dir` is no path.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_preset("my_gemma")
        lm = keras_gemma.models.GemmaCausalLM.from_preset("my_gemma")
        ```
        """
        from keras_gemma.storage.presets import save

        save(self, preset_dir, **kwargs)
