"""The command line of lm-evaluation-harness, with `--model keras_gemma`.

    python -m keras_gemma.evaluation run --model keras_gemma \\
        --model_args pretrained=gemma_tiny_en,dtype=float32 --tasks arc_easy --limit 100
"""

import lm_eval.models  # noqa: F401  # registers its own models, which it does only if none exist
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from keras_gemma.evaluation import harness

if __name__ == "__main__":
    model_registry.register("keras_gemma", harness.KerasGemmaLM)
    cli_evaluate()
