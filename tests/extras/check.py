"""Installs each extra by itself in a new environment, and runs the features that it promises there.

    python tests/extras/check.py [EXTRA ...]

An extra without a Keras backend gets that of `jax`. Environments are deleted. `make test-extras`
runs all; it is not part of `make test`, because it downloads gigabytes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

TORCH = ("torch==2.13.0",)
"""The CPU build, installed first where an extra needs PyTorch: PyPI's brings CUDA's libraries."""

LOAD = """
import keras_gemma
lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
assert lm.generate("ROMEO:", max_new_tokens=4).startswith("ROMEO:")
"""
TRAIN = """
lm.enable_lora(rank=2)
lm.fit(["First Citizen: Speak, speak."], batch_size=1, verbose=0)
"""

FEATURES = {
    "jax": LOAD + TRAIN + "lm.merge_lora(keep_base=False); lm.export('out', format='jax')",
    "torch": LOAD + TRAIN + "lm.merge_lora(keep_base=False); lm.export('out', format='torch')",
    "tensorflow": LOAD + "lm.export('out', max_new_tokens=4)",
    "hub": LOAD + "keras_gemma.from_keras_hub(keras_gemma.to_keras_hub(lm))",
    "gguf": LOAD + "lm.save_to_gguf('x.gguf'); type(lm).from_preset('x.gguf')",
    "orbax": LOAD + "lm.save_to_orbax('out'); type(lm).from_preset('out')",
    "plots": LOAD
    + "from keras_gemma import scoring\n"
    + "scoring.plots.logit_lens(scoring.logit_lens(lm, 'To be')).savefig('x.png')",
    "evaluation": LOAD
    + "import json, os, sys\n"
    + "from keras_gemma.evaluation import evaluate\n"
    + "row = {'goal': 'To sleep', 'sol1': 'Lie down', 'sol2': 'Stand up', 'label': 0}\n"
    + "os.makedirs('data/piqa')\n"
    + "open('data/piqa/validation.jsonl', 'w').write(json.dumps(row))\n"
    + "assert evaluate(lm, 'piqa', data='data')['piqa'].items == 1\n"
    + "assert not {'torch', 'transformers'} & set(sys.modules)",
    "serve": LOAD + "assert lm.generate('', response_format={'type': 'choice', 'choices': ['Ay.']},"
    " max_new_tokens=9) == 'Ay.'\n"
    + "from keras_gemma.causal_lm.text_engine import create_text_engine\n"
    + "from keras_gemma.serving import create_app\n"
    + "create_app(create_text_engine(lm, max_batch_size=2))",
    "onnx": LOAD + "lm.export('out', format='onnx'); import onnxruntime\n"
    "onnxruntime.InferenceSession('out/model.onnx')",
    "gemma3-270m": "import keras_gemma\n"
    "keras_gemma.models.GemmaCausalLM.from_preset('gemma3_270m_q4_k_m')",
}
"""A program for each extra."""

OWN_BACKEND = ("jax", "torch", "tensorflow", "onnx")
NEED_TORCH = ("torch", "onnx")


def check(extra: str) -> str:
    """Returns the error of an extra, or an empty string."""
    with tempfile.TemporaryDirectory(prefix="extra-") as folder:
        python = str(Path(folder, "venv/bin/python"))
        environment = {"PATH": os.environ["PATH"], "HOME": folder}
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        extras = extra if extra in OWN_BACKEND else f"jax,{extra}"
        steps = [
            [sys.executable, "-m", "venv", str(Path(folder, "venv"))],
            *([[*pip, *TORCH]] if extra in NEED_TORCH else []),
            [*pip, f"{copy_of_sources(folder)}[{extras}]"],
            [python, "-c", FEATURES[extra]],
        ]
        for step in steps:
            result = subprocess.run(
                step, cwd=folder, env=environment, capture_output=True, text=True
            )
            if result.returncode:
                return f"{step[-1]}\n{result.stderr[-2000:]}"
    return ""


def copy_of_sources(folder: str) -> str:
    """Copies what pip needs, because it builds in the folder of the sources."""
    target = Path(folder, "source")
    for name in ("keras_gemma", "presets"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return str(target)


def main() -> None:
    failed = 0
    for extra in sys.argv[1:] or FEATURES:
        error = check(extra)
        failed += bool(error)
        print(extra, "failed: " + error if error else "works", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
