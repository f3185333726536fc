"""Trains a small Gemma 2 from scratch on your text: vocabulary, model, preset.

    python examples/train_from_scratch.py my_text.txt my_preset

The built-in preset `gemma_tiny_en` was made by this script from the tiny Shakespeare corpus, with
the defaults below. The model is a small Gemma 2 with all features: grouped heads, both soft caps,
and sliding windows that are shorter than the context.
"""

# ruff: noqa: I001 - keras_gemma comes before keras, so that it can choose the backend.
import argparse
import json
import math
import time
from pathlib import Path

import keras_gemma
import keras
import numpy as np
from keras_gemma.models import (
    GemmaBackbone,
    GemmaCausalLM,
    GemmaCausalLMPreprocessor,
    GemmaTokenizer,
)
from keras_gemma.text.vocabulary import train_vocabulary

ARCHITECTURE = {
    "num_layers": 6,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_dim": 192,
    "intermediate_dim": 1024,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 64,
}


EPOCHS = 12
"""Number of evaluations of the held-out loss. The weights with the lowest are kept."""


class Windows(keras.utils.PyDataset):
    """Batches of windows that start with `<bos>` and a random line."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, length: int, batch: int, steps: int):
        super().__init__()
        self.ids, self.length, self.batch, self.steps = ids, length, batch, steps
        self.starts = starts[starts + length < len(ids)]
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple:
        starts = self.random.choice(self.starts, self.batch)
        return windows_at(self.ids, starts, self.length)


def windows_at(ids: np.ndarray, starts: np.ndarray, length: int) -> tuple:
    """Returns inputs `[B, length]`, which start with `<bos>`, and the token after each."""
    labels = np.stack([ids[start : start + length] for start in starts])
    inputs = np.concatenate([np.full((len(starts), 1), 2, "int32"), labels[:, :-1]], axis=1)
    return {"token_ids": inputs, "padding_mask": np.ones_like(inputs)}, labels


def bigram_loss(train: np.ndarray, held_out: np.ndarray, size: int) -> float:
    """Returns the loss of a bigram model with absolute discounting, in nats per token."""
    unigram = (np.bincount(train, minlength=size) + 1) / (len(train) + size)
    pairs = np.zeros((size, size), "float32")
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    totals, kinds = pairs.sum(1), (pairs > 0).sum(1)
    before, after = held_out[:-1], held_out[1:]
    seen = np.maximum(pairs[before, after] - 0.75, 0) + 0.75 * kinds[before] * unigram[after]
    probability = np.where(totals[before] > 0, seen / np.maximum(totals[before], 1), unigram[after])
    return float(-np.log(probability).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="text file in UTF-8")
    parser.add_argument("preset", type=Path, help="folder to write")
    parser.add_argument("--vocabulary-size", type=int, default=1024)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the text, at its end")
    options = parser.parse_args()
    if options.preset.exists():
        parser.error(f"{options.preset} exists: name a new folder")
    if options.steps < EPOCHS:
        parser.error(f"--steps must be at least {EPOCHS}, one per epoch. Received: {options.steps}")
    keras.utils.set_random_seed(0)

    text = options.text.read_text(encoding="utf-8")
    if len(text) < 20 * options.sequence_length:
        parser.error(f"{options.text} has {len(text)} characters, which are too few to train on")
    border = int(len(text) * (1 - options.held_out))
    border = text.rfind("\n", 0, border) + 1 or border
    train_text, held_out_text = text[:border], text[border:]

    tokenizer = GemmaTokenizer(train_vocabulary(train_text.splitlines(), options.vocabulary_size))
    train, held_out = np.array(tokenizer(train_text)), np.array(tokenizer(held_out_text))
    newline = tokenizer.token_to_id("\n")
    starts = np.concatenate([[0], np.flatnonzero(train == newline) + 1])
    print(f"{len(train)} tokens to train on, {len(held_out)} held out")

    backbone = GemmaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(), dropout=options.dropout, **ARCHITECTURE
    )
    lm = GemmaCausalLM(backbone)
    lm.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0,
                options.steps,
                alpha=0.02,
                warmup_target=options.learning_rate,
                warmup_steps=options.steps // 20,
            ),
            weight_decay=0.1,
            beta_2=0.99,
            global_clipnorm=1.0,
        ),
        weighted_metrics=[],
    )
    lm.summary()
    validation = windows_at(
        held_out,
        np.arange(0, len(held_out) - options.sequence_length, options.sequence_length),
        options.sequence_length,
    )
    data = Windows(
        train, starts, options.sequence_length, options.batch_size, options.steps // EPOCHS
    )
    best = Best()
    started = time.time()
    lm.fit(data, epochs=EPOCHS, validation_data=validation, callbacks=[best])
    minutes = (time.time() - started) / 60
    lm.set_weights(best.weights)

    preset = make_preset(lm, tokenizer, options.sequence_length)
    preset.compile(weighted_metrics=[])
    loss = preset.evaluate(*validation, verbose=0)
    tokens, size = len(held_out), len(held_out_text.encode())
    baseline = bigram_loss(train, held_out, tokenizer.vocabulary_size())
    print(f"trained in {minutes:.1f} minutes on {keras.config.backend()}")
    for name, nats in (("model, in bfloat16", loss), ("bigrams", baseline)):
        print(
            f"{name}: held-out loss {nats:.3f} nats per token, {nats * tokens / size:.3f} per byte "
            f"({nats * tokens / size / math.log(2):.3f} bits per byte)"
        )
    preset.save_to_preset(options.preset)
    load_as_float32(options.preset)
    lm = GemmaCausalLM.from_preset(options.preset)
    lm.compile(sampler=keras_gemma.samplers.TopPSampler(p=0.9, temperature=0.8, seed=0))
    print(lm.generate(text[: text.find("\n") + 1]))


class Best(keras.callbacks.Callback):
    """Callback that keeps the weights of the epoch with the lowest held-out loss."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.weights = float("inf"), None

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs["val_loss"] < self.loss:
            self.loss, self.weights = logs["val_loss"], self.model.get_weights()


def make_preset(lm: GemmaCausalLM, tokenizer: GemmaTokenizer, length: int) -> GemmaCausalLM:
    """Returns the trained model in bfloat16, without dropout, and with a preprocessor."""
    sizes = {**lm.backbone.config.to_dict(), "dropout": 0.0, "context_length": length}
    backbone = GemmaBackbone(**sizes, dtype="bfloat16", name="gemma_backbone")
    for name, weight in lm.backbone.named_weights().items():
        backbone.named_weights()[name].assign(weight.numpy())
    return GemmaCausalLM(
        backbone,
        GemmaCausalLMPreprocessor(tokenizer, sequence_length=length),
        name="gemma_causal_lm",
    )


def load_as_float32(preset: Path) -> None:
    """Makes float32 the default dtype of a preset that is stored in bfloat16.

    In float32, all backends generate the same text.
    """
    policy = keras.dtype_policies.serialize(keras.DTypePolicy("float32"))
    for name in ("config.json", "task.json"):
        description = json.loads((preset / name).read_text())
        backbone = description if name == "config.json" else description["config"]["backbone"]
        backbone["config"]["dtype"] = policy
        (preset / name).write_text(json.dumps(description, indent=4))


if __name__ == "__main__":
    main()
