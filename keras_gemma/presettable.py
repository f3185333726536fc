"""`from_preset` and `save_to_preset` of all classes that a preset can contain."""

from pathlib import Path
from typing import Any

from keras_gemma import catalogue


class _PublishedPresets:
    """Class property with all published presets."""

    def __get__(self, instance: Any, owner: type) -> dict[str, dict[str, Any]]:
        return {name: preset.describe() for name, preset in catalogue.presets().items()}


class Presettable:
    """Mixin of classes that are stored in a preset."""

    presets = _PublishedPresets()
    """Metadata of the built-in presets by name, in KerasHub's format.

    `{name: {"metadata": {"description", "params", "path", "context_length", "license",
    "license_url"}, "kaggle_handle": ..., "hugging_face_handle": ...}}`; the handles are `None` for
    presets that are part of the package.

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
        """Instantiates the class from a preset.

        Args:
            preset: A built-in name from `presets` (such as `"gemma_tiny_en"`), a local directory
                with a Keras preset, a Hugging Face or an Orbax checkpoint, a GGUF file, or a
                handle: `kaggle://owner/model/framework/variation[/version]`,
                `hf://owner/model[@revision]`, or `hf://` and a built-in name for its Hugging Face
                counterpart. Missing files are downloaded, but only those that the class needs. A
                built-in name takes precedence over a directory of the same name, with a warning:
                pass `./name` for the directory.
            load_weights: If False, the weights of a model are randomly initialized.
            dtype: Dtype of a model, such as `"bfloat16"`. `None` uses the preset's dtype.
            **kwargs: Constructor arguments that override those of the preset.

        Raises:
            ValueError: If the preset does not exist, a download fails, or its files do not match.
                The message names the cause and the remedy.
            FileNotFoundError: If the directory or a file in it is missing.
            TypeError: If an argument has the wrong type.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en", dtype="bfloat16")
        ```
        """
        from keras_gemma.storage.presets import load

        return load(cls, preset, load_weights, dtype, **kwargs)

    def save_to_preset(
        self,
        preset_dir: str | Path,
        max_shard_size: float | str | None = 10,
        *,
        overwrite: bool = False,
    ) -> None:
        """Saves to a preset directory, in KerasHub's format.

        Files are first written to a temporary directory next to `preset_dir`, then moved. If the
        machine stops during the move, the previous files are complete in a hidden directory such
        as `.my_gemma.k3x9/old`.

        Args:
            preset_dir: Path of the directory, which is created. A component of a model can also
                be saved to a preset that lacks it.
            max_shard_size: Maximum size of a weights file, in GB as in KerasHub, or a string such
                as `"500MB"`. `None` sets no limit.
            overwrite: If True, replaces the model in `preset_dir`, or the component. Directories
                without a Gemma model are never replaced.

        Raises:
            ValueError: If `preset_dir` exists, or is a URL or not writable, or if it is a Hugging
                Face checkpoint and this object is only a component of a model.
            OSError: If the disk is full.
            TypeError: If `preset_dir` is not a path.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_preset("my_gemma")
        lm = keras_gemma.models.GemmaCausalLM.from_preset("my_gemma")
        ```
        """
        from keras_gemma.storage.presets import save

        save(self, preset_dir, max_shard_size, overwrite)
