"""Pairs of a preferred and a rejected answer, as batches for `fit` with `PreferenceLoss`.

token_ids   [chosen, rejected, chosen, rejected, ...]     2B rows
labels      [label if learned, otherwise -1] + [reference log-probability of the answer]
"""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.checks import check_integer
from keras_gemma.text.preprocessor import require_preprocessor
from keras_gemma.training.documents import Document, fit_to_length, make_document
from keras_gemma.training.jsonl import parse, read_samples
from keras_gemma.training.preferences import answer_log_probabilities
from keras_gemma.training.row_packing import choose_length, make_batch
from keras_gemma.training.samples import BadSample, read_sample

ANSWERS = ("chosen", "rejected")


def preference_dataset(
    lm: GemmaCausalLM,
    source: Any,
    sequence_length: int | None = None,
    *,
    batch_size: int = 1,
    shuffle: bool = True,
    seed: int = 0,
) -> "PreferenceDataset":
    """Creates a dataset of preferred and rejected answers, for `fit` with `PreferenceLoss` (DPO).

    The reference model is the current state of `lm`, so call this function before training.

    Args:
        lm: The model to train.
        source: A list of samples, or the path of a JSON-lines file. A sample has `"prompt"`,
            `"chosen"` and `"rejected"`, each a string or a list of messages. Without `"prompt"`,
            the other two are whole conversations.
        sequence_length: Positions of a row, S. `None` chooses a length that fits the longest
            answer, up to the model's context length.
        batch_size: Pairs of a batch, B.
        shuffle: If True, the order differs in each epoch.
        seed: Seed of the order.

    Returns:
        A `keras.utils.PyDataset` of `({"token_ids", "padding_mask"}, labels)`, `[2B, S]` and
        `[2B, S + 1]`.

    Raises:
        ValueError: If a sample is bad or too long, there are no samples, an argument is out of
            range, or the model has no preprocessor.
        FileNotFoundError: If the file `source` does not exist.

    Example:

    ```python
    import keras
    import keras_gemma
    from keras_gemma import training

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.enable_lora(rank=4)
    pairs = [{"prompt": "Who is there?", "chosen": "Nay, answer me.", "rejected": "Nobody."}]
    data = training.preference_dataset(lm, pairs)
    loss = training.PreferenceLoss(beta=0.1)
    lm.compile(optimizer=keras.optimizers.AdamW(1e-3), loss=loss, weighted_metrics=[])
    lm.fit(data, epochs=3)
    ```
    """
    limit = lm.backbone.config.context_length if sequence_length is None else sequence_length
    check_integer("sequence_length", limit)
    check_integer("batch_size", batch_size)
    require_preprocessor(lm.preprocessor, "training", None)
    pairs = []
    for place, sample in read_samples(source):
        try:
            pair = []
            for conversation in conversations(parse(sample)):
                turns = read_sample(conversation)
                document = make_document(turns, lm.preprocessor.tokenizer, "assistant")
                pair.append(fit_to_length(document, limit, truncate=False)[0])
        except BadSample as problem:
            raise ValueError(f"{place}: {problem}. Correct it, or remove it.") from problem
        pairs.append(pair)
    if not pairs:
        raise ValueError("`source` has no usable sample.")
    if sequence_length is None:
        sizes = [len(document.inputs) for pair in pairs for document in pair]
        sequence_length = choose_length(sizes, batch_size, limit, packing=False)
    return PreferenceDataset(lm, pairs, sequence_length, batch_size, shuffle, seed)


def conversations(record: Any) -> Iterator[dict[str, Any]]:
    """Yields the conversation with the preferred answer, and the one with the rejected answer.

    Raises:
        BadSample: If an answer is missing.
    """
    if not (isinstance(record, Mapping) and set(ANSWERS) <= record.keys()):
        raise BadSample("a sample must be an object with 'chosen' and 'rejected', and a 'prompt'")
    for answer in ANSWERS:
        if "prompt" in record:
            yield {"prompt": record["prompt"], "completion": record[answer]}
        else:
            yield {"messages": record[answer]}


class PreferenceDataset(keras.utils.PyDataset):
    """Batches of pairs; created by `preference_dataset`."""

    holds_ids = True

    def __init__(
        self,
        lm: GemmaCausalLM,
        pairs: list[list[Document]],
        length: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.pairs, self.length, self.batch_size = pairs, length, batch_size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.pad_id = lm.preprocessor.tokenizer.pad_token_id
        self.reference = np.zeros((len(pairs), 2), "float32")
        for start in range(0, len(pairs), batch_size):
            indices = range(start, min(start + batch_size, len(pairs)))
            x, labels, weights = self._batch(indices)
            losses = lm.score(
                x["token_ids"], x["padding_mask"], scoring_mode="loss", target_ids=labels
            )
            scores = ops.convert_to_numpy(answer_log_probabilities(losses, weights))
            self.reference[indices] = scores[: 2 * len(indices)].reshape(-1, 2)

    def _batch(self, indices: Any) -> Any:
        rows = [[document] for i in indices for document in self.pairs[i]]
        return make_batch(rows, 2 * self.batch_size, self.length, self.pad_id)

    def __len__(self) -> int:
        """Returns the number of batches per epoch."""
        return -(-len(self.pairs) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        order = np.arange(len(self.pairs))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        indices = order[index * self.batch_size : (index + 1) * self.batch_size]
        if not len(indices):
            raise IndexError(f"Index {index} is out of range for {len(self)} batches.")
        x, labels, weights = self._batch(indices)
        targets = np.zeros((len(labels), self.length + 1), "float32")
        targets[:, :-1] = np.where(weights > 0, labels, -1)
        targets[: 2 * len(indices), -1] = self.reference[indices].reshape(-1)
        return x, targets

    def on_epoch_end(self) -> None:
        """Selects the order of the next epoch; called by `fit`."""
        self.epoch += 1
