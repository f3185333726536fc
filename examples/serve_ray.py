"""Replicas of a model behind one address, with Ray Serve.

    pip install "keras-gemma[serve,jax]" "ray[serve]"
    python examples/serve_ray.py --model gemma_tiny_instruct_en --replicas 2
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "gemma_tiny_instruct_en", "prompt": "1 + 1 =", "max_tokens": 8}'

Each replica is the application of `keras-gemma serve`, with its own model, engine and queue. Ray
sends a request to the less busy one of two replicas, restarts replicas that fail, and adds machines
with `ray start --address=...`. Clients see one server, with the same routes, streams and errors;
/metrics and /health are those of the replica that answers. A seeded request has the same answer on
each replica in float32, and with `--pinned`. A replica with `--gpus 1` has a GPU of its own.
"""

import argparse
from typing import TYPE_CHECKING

from ray import serve

if TYPE_CHECKING:
    from fastapi import FastAPI


def build_deployment(options: argparse.Namespace) -> serve.Application:
    """Returns the replicas. The model is loaded in each of them."""

    def build_app() -> "FastAPI":
        from keras_gemma import GemmaCausalLM
        from keras_gemma.causal_lm import text_engine
        from keras_gemma.serving import ServerSettings, create_app

        lm = GemmaCausalLM.from_preset(
            options.model, dtype=options.dtype, quantization=options.quantization
        )
        engine = text_engine.create_text_engine(
            lm, max_batch_size=options.max_batch_size, pinned=options.pinned
        )
        settings = ServerSettings(served_names=(options.model,), api_keys=tuple(options.api_key))
        return create_app(engine, settings)

    @serve.deployment(
        name="keras_gemma",
        num_replicas=options.replicas,
        # More requests wait in the engine, which refuses them when its own queue is full.
        max_ongoing_requests=16 * options.max_batch_size,
        graceful_shutdown_timeout_s=60,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    @serve.ingress(build_app)
    class Replica:
        """The application, in a process of its own."""

    return Replica.bind()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma_tiny_instruct_en")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--max-batch-size", type=int, default=8, help="slots of each replica")
    parser.add_argument("--pinned", action="store_true", help="the same bits under any load")
    parser.add_argument("--dtype")
    parser.add_argument("--quantization")
    parser.add_argument("--api-key", nargs="*", default=[])
    parser.add_argument("--cpus", type=float, default=1, help="cores of each replica")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(build_deployment(options), blocking=True)


if __name__ == "__main__":
    main()
