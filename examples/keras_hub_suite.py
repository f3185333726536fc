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


class ReplacedClasses:
    """A pytest plugin that replaces KerasHub's classes in its test files."""

    def pytest_collection_modifyitems(self, items: list) -> None:
        import keras_gemma

        homes = (keras_gemma.models, keras_gemma.tokenizers, keras_gemma.samplers)
        for module in {item.module for item in items}:
            for name in set(vars(module)):
                home = next((home for home in homes if name in home.__all__), None)
                if home is not None:
                    setattr(module, name, getattr(home, name))


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
