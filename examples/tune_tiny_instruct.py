"""Makes the built-in preset `gemma_tiny_instruct_en`: vocabulary, model, training, preset.

    python examples/instruct_data.py instruct
    python examples/tune_tiny_instruct.py instruct my_preset
    python examples/instruct_accuracy.py my_preset instruct/held_out.jsonl

The model is trained from scratch with its own vocabulary, in which each character is a token. A
million parameters can then learn to spell and reverse words. The rest is the recipe of
`keras-gemma finetune --full`. An interrupted run resumes from its last checkpoint.
"""

# ruff: noqa: I001 - keras_gemma comes before keras, so that it can choose the backend.
import argparse
import string
from pathlib import Path

import keras_gemma  # noqa: F401
import keras
from keras_gemma import training
from keras_gemma.models import (
    GemmaBackbone,
    GemmaCausalLM,
    GemmaCausalLMPreprocessor,
    GemmaTokenizer,
)
from keras_gemma.text.vocabulary import train_vocabulary
import train_from_scratch
from train_from_scratch import load_as_float32, make_preset

ARCHITECTURE = {
    **train_from_scratch.ARCHITECTURE,
    "num_layers": 4,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 128,
}
"""Sizes of the model, smaller than those of `gemma_tiny_en`."""

CHARACTERS = string.ascii_letters + string.digits + string.punctuation
WORDS = str.split("""
user model Answer backwards capital capitals Capital count Count Goodbye Hello letters
numbers please Please reverse Reverse spell Spell upper welcome What what Which which
""")
"""Words that are tokens, so that questions are shorter. No other word contains one of them."""
VOCABULARY_SIZE = 466 + len(WORDS)
"""Control tokens, bytes, newlines, spaces, characters and words, without merges."""

CONTEXT = 256

STAGES = {
    "drills": (128, 3e-3),
    "short": (128, 2.5e-3),
    "long": (256, 1e-3),
    "last": (128, 2e-3),
}
"""File of `instruct_data.py` to row length, in tokens, and learning rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder written by instruct_data.py")
    parser.add_argument("preset", type=Path, help="folder to write")
    parser.add_argument("--run", type=Path, default=Path("tiny_instruct_run"), help="run folder")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, help="steps per stage  [default: all data]")
    options = parser.parse_args()
    if options.preset.exists():
        parser.error(f"{options.preset} exists: name a new folder")

    keras.utils.set_random_seed(0)
    tokenizer = GemmaTokenizer(train_vocabulary([" ".join(CHARACTERS)], VOCABULARY_SIZE, WORDS))
    sizes = {"vocabulary_size": VOCABULARY_SIZE, "context_length": CONTEXT}
    lm = GemmaCausalLM(
        GemmaBackbone(**sizes, **ARCHITECTURE),
        GemmaCausalLMPreprocessor(tokenizer, sequence_length=CONTEXT),
    )
    for name, (length, rate) in STAGES.items():
        data = training.chat_dataset(
            options.data / f"{name}.jsonl",
            tokenizer,
            sequence_length=length,
            batch_size=options.batch_size,
            truncate=True,  # The lengths in the data are estimates.
        )
        print(data.describe())
        training.finetune(
            lm,
            data,
            options.run / name,
            samples=["Reverse kitten.", "What is 17 + 8?", "What is the capital of Peru?"],
            steps=options.steps,
            evaluate_every=500,
            learning_rate=rate,
            weight_decay=0.01,
        )
    make_preset(lm, tokenizer, CONTEXT).save_to_preset(options.preset)
    load_as_float32(options.preset)


if __name__ == "__main__":
    main()
