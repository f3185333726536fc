"""A tiny model, data, and a run that can be interrupted."""

import os
import signal

import keras

from keras_gemma import GemmaCausalLM
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.training import chat_dataset, finetune
from tests.models import compile_lm, make_backbone

PAIRS = [{"prompt": f"to be {i}", "completion": f"or not {i % 3}"} for i in range(10)]
SETTINGS = {"learning_rate": 2e-2, "epochs": 2, "evaluate_every": 2, "verbose": False}
LONG = SETTINGS | {"accumulate": 2, "epochs": 3, "evaluate_every": 3}


def make(tiny_proto, lora=True, dropout=0.0):
    keras.utils.set_random_seed(0)
    preprocessor = GemmaCausalLMPreprocessor(GemmaTokenizer(tiny_proto), 32)
    lm = GemmaCausalLM(make_backbone("gemma2_grouped", num_layers=1), preprocessor)
    compile_lm(lm)
    if lora:
        lm.enable_lora(rank=2, targets="all-linear", dropout=dropout, seed=0)
    return lm


def run_long(proto, folder, *callbacks):
    """Runs `finetune` with dropout, optimizer moments, accumulated gradients and validation."""
    tokenizer = GemmaTokenizer(proto)
    data = chat_dataset(PAIRS, tokenizer, 64, packing=False, batch_size=2)
    held_out = chat_dataset(["the heart-ache"], tokenizer, 64)
    lm = make(proto, dropout=0.2)
    return finetune(lm, data, folder, validation_data=held_out, callbacks=callbacks, **LONG)


class Kill(keras.callbacks.Callback):
    """Kills the process after eight steps, as `kill -9` does."""

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == 8:
            os.kill(os.getpid(), signal.SIGKILL)
