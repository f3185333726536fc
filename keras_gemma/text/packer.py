"""KerasHub's packer: rows of ids with start and end tokens, truncated or padded to one length.

For custom preprocessing in KerasHub's style. Knows nothing about text.
"""

import dataclasses
from typing import Any

import numpy as np

from keras_gemma import tf_data
from keras_gemma.checks import check_integer
from keras_gemma.text.inputs import pad_rows, read_ids


@dataclasses.dataclass(frozen=True)
class StartEndPacker:
    """Adds start and end tokens to rows of ids, and truncates or pads them.

    Created by `GemmaPreprocessor.packer`, with the names of `keras_hub.layers.StartEndPacker`.

    Example:

    ```python
    import keras_gemma

    preprocessor = keras_gemma.GemmaCausalLMPreprocessor.from_preset("gemma_tiny_en")
    ids = preprocessor.tokenizer("It ran.")
    token_ids, padding_mask = preprocessor.packer(ids, sequence_length=8, add_end_value=False)
    ```
    """

    sequence_length: int
    """Number of ids per row, S. It follows the preprocessor, whose value can be changed."""
    start_value: list[int]
    """Ids that begin each row."""
    end_value: list[int]
    """Ids that end each row."""
    pad_value: int
    """Id of padding."""

    def __call__(
        self,
        inputs: Any,
        sequence_length: int | None = None,
        add_start_value: bool = True,
        add_end_value: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Packs one row of ids, or a batch of rows.

        Args:
            inputs: Ids `[T]`, or B rows of ids: lists, arrays or tensors.
            sequence_length: Number of ids per row in this call. `None` uses the attribute.
            add_start_value: If True, rows begin with `start_value`, also if they already do.
            add_end_value: If True, rows end with `end_value`, also if they are truncated.

        Returns:
            Ids, int32 `[B, S]`, and the padding mask, bool `[B, S]`, without B for one row.

        Raises:
            ValueError: If `sequence_length` is too small, or `inputs` is a tensor of
                `tf.data.Dataset.map`.
        """
        if tf_data.is_symbolic(getattr(inputs, "flat_values", inputs)):  # also ragged
            raise ValueError(
                "`packer` does not support `tf.data.Dataset.map`: map the preprocessor, which does."
            )
        start = self.start_value if add_start_value else []
        end = self.end_value if add_end_value else []
        length = self.sequence_length if sequence_length is None else sequence_length
        check_integer("sequence_length", length, max(1, len(start) + len(end)))
        rows, batched = read_ids(inputs)
        kept = length - len(start) - len(end)
        packed = [[*start, *row[:kept].tolist(), *end] for row in rows]
        ids, mask = pad_rows(packed, length, self.pad_value)
        return (ids, mask) if batched else (ids[0], mask[0])
