"""Speed and memory of a LoRA step with this package, KerasHub, and transformers with PEFT.

    python examples/benchmarks/finetune.py --libraries keras_gemma keras_hub --backends jax

Random weights in the sizes of a preset, cut to a few layers; adapters of rank 8 on query and value
matrices; Adam; one row of `--length` tokens that all count in the loss. Each line is measured in
its own process:

    tokens/s     of the fastest step after the first
    peak         peak memory during training, in addition to that before the model (Linux)
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from child import add_common_arguments, memory, reset_peak, run_command

ON_KERAS = ("keras_gemma", "keras_hub")


def make_keras_gemma(config: Any, options: argparse.Namespace) -> Callable[..., float]:
    import keras

    from keras_gemma.benchmark.random_model import random_model

    lm = random_model(config, options.dtype)
    lm.enable_lora(rank=8, alpha=16, targets=("query", "value"))
    lm.backbone.rematerialize = options.remat
    jit = "auto" if options.jit == "auto" else options.jit == "yes"
    lm.compile(optimizer=keras.optimizers.Adam(1e-4), weighted_metrics=[], jit_compile=jit)
    return on_keras(lm)


def make_keras_hub(config: Any, options: argparse.Namespace) -> Callable[..., float]:
    import keras
    import keras_hub

    sizes = {k: v for k, v in config.to_dict().items() if k != "context_length"}
    backbone = keras_hub.models.GemmaBackbone(**sizes, dtype=options.dtype)
    backbone.enable_lora(rank=8)
    lm = keras_hub.models.GemmaCausalLM(backbone, None)
    lm.compile(
        optimizer=keras.optimizers.Adam(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    return on_keras(lm)


def on_keras(lm: Any) -> Callable[..., float]:
    def step(ids: np.ndarray) -> float:
        x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, 1:])}
        logs = lm.train_on_batch(x, ids[:, 1:], np.ones(ids[:, 1:].shape, "float32"))
        return float(logs[0] if isinstance(logs, list) else logs)

    return step


def make_transformers(config: Any, options: argparse.Namespace) -> Callable[..., float]:
    import peft
    import torch
    import transformers

    torch.set_default_dtype(getattr(torch, options.dtype))
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=config.vocabulary_size,
            hidden_size=config.hidden_dim,
            intermediate_size=config.intermediate_dim // 2,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_query_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            attn_implementation="eager",
        )
    )
    torch.set_default_dtype(torch.float32)
    adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, adapter)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-4)

    def step(ids: np.ndarray) -> float:
        # transformers shifts the labels itself, so the last position has none.
        inputs = torch.tensor(ids[:, :-1], dtype=torch.long)
        optimizer.zero_grad()
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


MAKERS = {
    "keras_gemma": make_keras_gemma,
    "keras_hub": make_keras_hub,
    "transformers": make_transformers,
}


def measure(library: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the measurements of a library, in this process."""
    from keras_gemma.catalogue import presets

    config = dataclasses.replace(presets()[options.shape].config, num_layers=options.layers)
    importers = {"keras_gemma": "keras_gemma", "keras_hub": "keras_hub", "transformers": "peft"}
    __import__(importers[library])
    before = memory("VmRSS")
    step = MAKERS[library](config, options)
    ids = np.random.default_rng(0).integers(200, config.vocabulary_size, (1, options.length + 1))
    reset_peak()
    seconds, losses = [], []
    for _ in range(options.steps):
        start = time.perf_counter()
        losses.append(step(ids.astype("int32")))
        seconds.append(time.perf_counter() - start)
    peak = memory("VmHWM") - before
    bandwidth = None
    if library == "keras_gemma":
        from keras_gemma.backend import memory_bandwidth

        bandwidth = round(memory_bandwidth() / 1e9, 1)
    return {
        "tokens_per_second": round(options.length / min(seconds[1:]), 1),
        "first_step_seconds": round(seconds[0], 2),
        "peak_gb": round(peak / 1e9, 2),
        "losses": [round(loss, 3) for loss in losses],
        "bandwidth_gb_per_second": bandwidth,
    }


def run(library: str, backend: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Runs `measure` in a subprocess. The result has the key `"error"` if it failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", library]
    return {"library": library, "backend": backend, **run_command(command, backend, options.limit)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, 2, list(MAKERS))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3, help="the first does not count")
    parser.add_argument(
        "--remat", action="store_true", help="keras_gemma: rematerialize the blocks"
    )
    parser.add_argument("--jit", default="auto", choices=["auto", "yes", "no"])
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps must be at least 2. Received: {options.steps}")
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    for library in options.libraries:
        for backend in options.backends if library in ON_KERAS else [None]:
            print(json.dumps(run(library, backend, options)), flush=True)


if __name__ == "__main__":
    main()
