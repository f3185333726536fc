"""Runs KerasHub's own tests of Gemma and of samplers with the classes of this package.

    git clone https://github.com/keras-team/keras-hub
    KERAS_BACKEND=jax python examples/keras_hub_suite.py keras-hub
    KERAS_BACKEND=jax python examples/keras_hub_suite.py keras-hub --theirs   # for comparison

Options after `--` are pytest's. Needs pytest, absl-py and KerasHub's dependencies. The page
docs/migration.md explains the tests that fail.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

TESTS = (
    "models/gemma/gemma_backbone_test.py",
    "models/gemma/gemma_causal_lm_preprocessor_test.py",
    "models/gemma/gemma_causal_lm_test.py",
    "models/gemma/gemma_lora_test.py",
    "models/gemma/gemma_tokenizer_test.py",
    "models/gemma3/gemma3_backbone_test.py",
    "models/gemma3/gemma3_causal_lm_preprocessor_test.py",
    "models/gemma3/gemma3_causal_lm_test.py",
    "models/gemma3/gemma3_lora_test.py",
    "models/gemma3/gemma3_tokenizer_test.py",
    "samplers/beam_sampler_test.py",
    "samplers/contrastive_sampler_test.py",
    "samplers/greedy_sampler_test.py",
    "samplers/random_sampler_test.py",
    "samplers/serialization_test.py",
    "samplers/top_k_sampler_test.py",
    "samplers/top_p_sampler_test.py",
)
"""Files of KerasHub that test text models and samplers which both packages have."""

NO_TEXT = "Vision or vision or Embedder or embedder or image"
"""Tests of images and of text embeddings, which this package does not have."""


MOCK = "MockGemma3Tokenizer"
"""KerasHub's test double of a tokenizer, with these words in place of a vocabulary."""
IMAGES = ("Gemma3ImageConverter", "Gemma3VisionEncoder")
"""Classes for images, which tests of text create too and do not use."""
WORDS = ("the", "brown", "earth", "fox", "is", "quick", "round")


class ReplacedClasses:
    """A pytest plugin that replaces KerasHub's classes in its test files."""

    def pytest_collection_modifyitems(self, items: list) -> None:
        import keras_gemma
        from keras_gemma import samplers

        homes = (keras_gemma.models, keras_gemma.tokenizers, samplers)
        for module in {item.module for item in items}:
            for name in set(vars(module)):
                home = next((home for home in homes if name in home.__all__), None)
                if home is not None:
                    setattr(module, name, getattr(home, name))
            for name in set(IMAGES) & vars(module).keys():
                setattr(module, name, lambda **arguments: None)
            if module.__name__.endswith("gemma3_causal_lm_test"):
                module.Gemma3CausalLMPreprocessor = without_images()
            if MOCK in vars(module):
                setattr(module, MOCK, word_tokenizer)
            for name in ("get", "serialize", "deserialize"):
                if getattr(vars(module).get(name), "__module__", "").startswith("keras_hub"):
                    setattr(module, name, getattr(samplers, name))


def without_images() -> type:
    """Returns a preprocessor that leaves images out of the data."""
    import keras

    import keras_gemma

    @keras.saving.register_keras_serializable(package="keras_hub_suite")
    class TextPreprocessor(keras_gemma.models.Gemma3CausalLMPreprocessor):
        def call(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, dict):
                x = {name: value for name, value in x.items() if name != "images"}
            return super().call(x, *args, **kwargs)

    return TextPreprocessor


def word_tokenizer(**arguments: Any) -> Any:
    """Returns a `Gemma3Tokenizer` with the ids of KerasHub's test double."""
    from sentencepiece import sentencepiece_model_pb2

    import keras_gemma

    names = ("<pad>", "<bos>", "<eos>", "<unk>", "<start_of_image>", "<end_of_image>")
    names += ("<start_of_turn>", "<end_of_turn>", "<img>")
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    for id, name in enumerate(names):
        kind = model.SentencePiece.UNKNOWN if name == "<unk>" else model.SentencePiece.CONTROL
        model.pieces.add(piece=name, score=0.0, type=kind)
        for token in ("pad", "bos", "eos", "unk"):
            if name == f"<{token}>":
                setattr(model.trainer_spec, f"{token}_id", id)
    for word in WORDS:
        model.pieces.add(piece="\u2581" + word, score=-1.0)
    model.pieces.add(piece="\n\n", score=-1.0)
    return keras_gemma.models.Gemma3Tokenizer(model.SerializeToString(), **arguments)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="folder of KerasHub's repository")
    parser.add_argument("--theirs", action="store_true", help="leave KerasHub's classes")
    parser.add_argument("options", nargs="*", help="options of pytest")
    arguments = parser.parse_args()
    source = arguments.checkout / "keras_hub" / "src"
    if not source.is_dir():
        parser.error(f"`checkout` must be a folder of KerasHub's repository: {source} is missing")
    import pytest

    sys.path.insert(0, os.fspath(arguments.checkout.resolve()))
    tests = [os.fspath(source / name) for name in TESTS if (source / name).is_file()]
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={arguments.checkout}"]
    options += ["-k", f"not ({NO_TEXT})", *arguments.options]
    plugins = [] if arguments.theirs else [ReplacedClasses()]
    return pytest.main([*options, *tests], plugins)


if __name__ == "__main__":
    sys.exit(main())
