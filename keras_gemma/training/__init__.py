"""Fine-tuning: datasets, training runs, and direct preference optimization.

In the order of the data:

    samples.py             samples in all accepted formats, as turns or plain text
    documents.py           samples as token ids, with the tokens that have a loss
    jsonl.py               documents from lists and JSON-lines files; skips bad samples
    row_packing.py         documents in rows, and rows in batches
    chat_dataset.py        the dataset for `fit`
    settings.py            settings of `finetune`
    log.py                 metrics of a run, and their plot
    checkpoint.py          state of a run, in one file
    training_run.py        schedule, steps, evaluation, checkpoints, samples
    finetune.py            the function `finetune`
    preferences.py         loss of preferred and rejected answers (DPO)
    preference_dataset.py  pairs of answers as a dataset for `fit`
"""

from keras_gemma.training.chat_dataset import ChatDataset, ChatStream, chat_dataset
from keras_gemma.training.finetune import FinetuneResult, finetune
from keras_gemma.training.preference_dataset import PreferenceDataset, preference_dataset
from keras_gemma.training.preferences import PreferenceLoss, answer_log_probabilities, dpo_loss
from keras_gemma.training.settings import FinetuneSettings

__all__ = [
    "ChatDataset",
    "ChatStream",
    "FinetuneResult",
    "FinetuneSettings",
    "PreferenceDataset",
    "PreferenceLoss",
    "answer_log_probabilities",
    "chat_dataset",
    "dpo_loss",
    "finetune",
    "preference_dataset",
]
