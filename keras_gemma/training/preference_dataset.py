"""Pairs of a preferred and a rejected answer, as batches that `fit` takes beside `PreferenceLoss`.

    token_ids   [chosen, rejected, chosen, rejected, ...]     2B rows
    labels      [learned: the label, else -1] + [the reference's log probability of the answer]

Knows tokens, and the model that answers are compared with as it is in the beginning.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.training.documents import Document, document_maker, fit_into
from keras_gemma.training.jsonl import number, parse, read_lines
from keras_gemma.training.preferences import answer_log_probabilities
from keras_gemma.training.row_packing import make_batch
from keras_gemma.training.samples import BadSample, read_sample

ANSWERS = ("chosen", "rejected")


def preference_dataset(
    lm: GemmaCausalLM,
    source: Any,
    sequence_length: int = 1024,
    *,
    batch_size: int = 1,
    shuffle: bool = True,
    seed: int = 0,
) -> "PreferenceDataset":
    """Training data from preferred and rejected answers, for `fit` with `PreferenceLoss` (DPO).

    The reference is `lm` as it is at this call: make the data set before anything is trained.

    Args:
        lm: the model that is going to be trained.
        source: a list of samples, or the path of a file with one a line, in JSON. A sample has
            `"prompt"`, `"chosen"` and `"rejected"`, strings or lists of messages; or the last two
            alone, as whole conversations.
        sequence_length: positions a row, S.
        batch_size: pairs a batch, B.
        shuffle: another order in each epoch.
        seed: of the order.

    Returns:
        A `keras.utils.PyDataset` of `({"token_ids", "padding_mask"}, labels)`, `[2B, S]` and
        `[2B, S + 1]`.

    Raises:
        ValueError: a bad or too long sample, with its place and the reason; no samples at all;
            settings out of range; a model without a preprocessor.
        FileNotFoundError: no file at `source`.

    Example:

    ```python
    import keras
    import keras_gemma
    from keras_gemma import training

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.enable_lora(rank=4)
    pairs = [{"prompt": "Who is there?", "chosen": "Nay, answer me.", "rejected": "Nobody."}]
    data = training.preference_dataset(lm, pairs, sequence_length=64)
    loss = training.PreferenceLoss(beta=0.1)
    lm.compile(optimizer=keras.optimizers.AdamW(1e-3), loss=loss, weighted_metrics=[])
    lm.fit(data, epochs=3)
    ```
    """
    for name, value in {"sequence_length": sequence_length, "batch_size": batch_size}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    if lm.preprocessor is None:
        raise ValueError("`lm` must have a preprocessor: without one it cannot read texts.")
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no file of samples at {str(source)!r}.")
    samples = read_lines(Path(source)) if isinstance(source, str | Path) else number(source)
    make = document_maker(lm.preprocessor.tokenizer, "assistant")
    pairs = []
    for place, sample in samples:
        try:
            record = parse(sample) if isinstance(sample, bytes) else sample
            documents = (make(read_sample(answered)) for answered in conversations(record))
            pairs.append([fit_into(document, sequence_length, False)[0] for document in documents])
        except BadSample as problem:
            raise ValueError(f"{place}: {problem}. Correct it, or leave it out.") from problem
    if not pairs:
        raise ValueError("`source` holds no sample that could be learned from.")
    return PreferenceDataset(lm, pairs, sequence_length, batch_size, shuffle, seed)


def conversations(record: Any) -> Iterator[dict[str, Any]]:
    """The conversation with the preferred answer, and that with the rejected one.

    Raises:
        BadSample: an answer is missing.
    """
    if not (isinstance(record, Mapping) and set(ANSWERS) <= record.keys()):
        raise BadSample("a sample must be an object with 'chosen' and 'rejected', and a 'prompt'")
    for answer in ANSWERS:
        if "prompt" in record:
            yield {"prompt": record["prompt"], "completion": record[answer]}
        else:
            yield {"messages": record[answer]}


class PreferenceDataset(keras.utils.PyDataset):
    """Batches of pairs; made by `preference_dataset`."""

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
            chosen = range(start, min(start + batch_size, len(pairs)))
            x, labels, weights = self._batch(chosen)
            losses = lm.score(
                x["token_ids"], x["padding_mask"], scoring_mode="loss", target_ids=labels
            )
            found = ops.convert_to_numpy(answer_log_probabilities(losses, weights))
            self.reference[chosen] = found[: 2 * len(chosen)].reshape(-1, 2)

    def _batch(self, chosen: Any) -> Any:
        rows = [[document] for i in chosen for document in self.pairs[i]]
        return make_batch(rows, 2 * self.batch_size, self.length, self.pad_id)

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.pairs) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        order = np.arange(len(self.pairs))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        if not len(chosen):
            raise IndexError(f"batch {index} of {len(self)}")
        x, labels, weights = self._batch(chosen)
        told = np.zeros((len(labels), self.length + 1), "float32")
        told[:, :-1] = np.where(weights > 0, labels, -1)
        told[: 2 * len(chosen), -1] = self.reference[chosen].reshape(-1)
        return x, told

    def on_epoch_end(self) -> None:
        """`fit` calls it."""
        self.epoch += 1
