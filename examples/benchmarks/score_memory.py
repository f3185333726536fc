"""Memory of `score` in addition to the weights: the loss of one long text.

    python examples/benchmarks/score_memory.py --backends jax torch tensorflow

Gemma 2 2B's shape cut to 2 layers, random bfloat16 weights, and one text of 4,096 tokens, whose
logits would be 4.2 GB in float32. Each line is measured in its own process:

    plain       compiled, without hooks
    hooked      with a hook at each block that changes nothing
    gradient    gradient of the summed loss with respect to the embeddings

Needs Linux, which reports the peak memory of a process. Device memory is not counted.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TOKENS, LAYERS = 4096, 2
WAYS = ("plain", "hooked", "gradient")


def gradient(backend: str, loss: Callable[..., Any]) -> Any:
    """Returns the gradient of `sum(loss(hook))` with respect to the embeddings."""
    if backend == "jax":
        import jax

        seen = {}
        loss(lambda x, layer: seen.setdefault(layer, x) if layer == -1 else x)
        (embeddings,) = seen.values()

        def replaced(vectors: Any) -> Any:
            return loss(lambda x, layer: vectors if layer == -1 else x).sum()

        return jax.grad(replaced)(embeddings)
    if backend == "torch":
        import torch

        seen = {}
        total = loss(lambda x, layer: seen.setdefault(layer, x) if layer == -1 else x).sum()
        return torch.autograd.grad(total, seen[-1])[0]
    import tensorflow as tf

    with tf.GradientTape() as tape:

        def watch(x: Any, layer: int) -> Any:
            if layer == -1:
                nonlocal embeddings
                embeddings = x
                tape.watch(x)
            return x

        embeddings = None
        losses = loss(watch)
    return tape.gradient(losses, embeddings)


def measure(way: str) -> dict[str, Any]:
    """Returns the measurements of one way, in this process."""
    import dataclasses

    import keras

    from keras_gemma.benchmark import memory
    from keras_gemma.benchmark.random_model import random_model
    from keras_gemma.catalogue import presets

    config = dataclasses.replace(presets()["gemma2_2b_en"].config, num_layers=LAYERS)
    lm = random_model(config, "bfloat16")
    ids = np.random.default_rng(0).integers(8, config.vocabulary_size, (1, TOKENS))
    backend = keras.config.backend()

    def loss(hook: Any = None) -> Any:
        targets = np.roll(ids, -1, axis=1)
        return lm.score(ids, None, "loss", layer_intercept_fn=hook, target_ids=targets)

    run = {
        "plain": loss,
        "hooked": lambda: loss(lambda x, layer: x),
        "gradient": lambda: gradient(backend, loss),
    }[way]
    gc.collect()
    before = memory.resident()
    memory.reset_peak()
    start = time.perf_counter()
    result = keras.ops.convert_to_numpy(keras.ops.cast(run(), "float32"))
    return {
        "backend": backend,
        "way": way,
        "peak_gb": round((memory.peak() - before) / 1e9, 2),
        "seconds": round(time.perf_counter() - start, 1),
        "mean_size": float(np.abs(result).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    for backend in options.backends:
        for way in options.ways:
            environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [sys.executable, __file__, "--one", way]
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            lines = result.stdout.strip().splitlines() or [str(result)]
            print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
