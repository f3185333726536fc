"""Making a model one's own.

samples.py        what a line of data says: turns, or a plain text
documents.py      a sample as ids, and which of them are learned
reading.py        samples one after the other, bad ones told of or counted
packing.py        documents side by side in rows, and rows in batches
chat_dataset.py   all of that as a data set that `fit` takes
finetune.py       the recipe, as it is called
settings.py       its numbers
training_run.py   its work: schedule, steps, evaluation, checkpoints, samples
checkpoint.py     where a run stands, in one file
log.py            its figures, and their picture
preferences.py    the loss of preferred and rejected answers (DPO)
preference_dataset.py    pairs of such answers as a data set
"""

from keras_gemma.training.chat_dataset import ChatDataset, ChatStream, chat_dataset
from keras_gemma.training.finetune import Finetuned, finetune
from keras_gemma.training.preference_dataset import PreferenceDataset, preference_dataset
from keras_gemma.training.preferences import PreferenceLoss, answer_log_probabilities, dpo_loss
from keras_gemma.training.settings import FinetuneSettings

__all__ = [
    "ChatDataset",
    "ChatStream",
    "FinetuneSettings",
    "Finetuned",
    "PreferenceDataset",
    "PreferenceLoss",
    "answer_log_probabilities",
    "chat_dataset",
    "dpo_loss",
    "finetune",
    "preference_dataset",
]
