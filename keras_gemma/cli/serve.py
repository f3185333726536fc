"""`keras-gemma serve`: an HTTP server with the APIs of OpenAI, Anthropic and TGI."""

import os
import sys
from pathlib import Path

import typer
from typer import Argument, BadParameter, Option

from keras_gemma import progress
from keras_gemma.cli.options import (
    DEFAULT_CHAT_MODEL,
    MODEL_HELP,
    BackendOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    Fit,
    LoadedQuantization,
    LoraOption,
    ModelOptions,
    complete_model,
    drop_none,
    start,
)
from keras_gemma.extras import check_serve

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
"""Hosts that only this machine reaches."""

API_KEY_VARIABLE = "KERAS_GEMMA_API_KEY"
"""Environment variable with a key."""


def serve(
    model: str | None = Argument(
        None, metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model, show_default=False
    ),
    host: str = Option("127.0.0.1", help="Address to listen on. 0.0.0.0 is reached from outside."),
    port: int = Option(8000, min=0, max=65535, help="Port. 0 chooses a free one."),
    api_key: list[str] = Option(
        [],
        envvar=API_KEY_VARIABLE,
        show_envvar=True,
        help="Key that requests must have. Can be repeated.",
        show_default="none is needed with a local --host",
    ),
    api_key_file: Path | None = Option(
        None, help="File with one key per line.", exists=True, dir_okay=False
    ),
    no_api_key: bool = Option(
        False, "--no-api-key", help="Serve everyone who reaches --host, without a key."
    ),
    served_name: list[str] = Option(
        [], help="Name of the model in requests. Can be repeated.", show_default="MODEL"
    ),
    max_batch_size: int | None = Option(
        None, min=1, help="Maximum number of texts that are decoded together.", show_default="8"
    ),
    max_length: int | None = Option(
        None, min=2, help="Maximum number of tokens of prompt and answer.", show_default="context"
    ),
    max_queued_requests: int | None = Option(
        None, min=1, help="Requests that may wait. Others are refused.", show_default="128"
    ),
    max_queued_tokens: int | None = Option(
        None, min=1, help="Prompt tokens that may wait.", show_default="by batch and length"
    ),
    pinned: bool = Option(
        False,
        "--pinned",
        help="Answers do not depend on the load, bit for bit. Slower for one request.",
    ),
    drain: float = Option(30.0, min=0, help="Seconds for running requests after SIGTERM."),
    lora: LoraOption = None,
    fit: Fit = Option("auto", help="Same as in `generate`."),
    quantization: LoadedQuantization | None = Option(
        None, help="Precision of the matrices, instead of --fit."
    ),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    log_prompts: bool = Option(False, "--log-prompts", help="Write prompts into the log."),
    metrics_without_key: bool = Option(
        False, "--metrics-without-key", help="/metrics needs no key."
    ),
    cors_origin: list[str] = Option(
        [], help="Web page that may call the server, or *. Can be repeated.", show_default="none"
    ),
    root_path: str = Option("", help="Path prefix that a proxy removes.", show_default="none"),
    ssl_certfile: Path | None = Option(None, help="TLS certificate.", exists=True, dir_okay=False),
    ssl_keyfile: Path | None = Option(None, help="TLS key.", exists=True, dir_okay=False),
    debug: DebugOption = False,
) -> None:
    """Serve MODEL over HTTP, with the APIs of OpenAI, Anthropic and TGI, and a chat page."""
    check_serve()
    if ssl_keyfile is not None and ssl_certfile is None:
        raise BadParameter("needs --ssl-certfile", param_hint="--ssl-keyfile")
    keys = (*api_key, *(read_keys(api_key_file) if api_key_file else ()))
    if not all(keys):
        raise BadParameter("a key must not be empty", param_hint="--api-key")
    if keys and no_api_key:
        raise BadParameter("excludes keys", param_hint="--no-api-key")
    if not keys and not no_api_key:
        check_open(host)
    precision = {"fit": fit, "quantization": quantization, "dtype": dtype}
    options = ModelOptions(model=model, lora=lora, device=device, backend=backend, **precision)
    start(backend, device, debug)

    # These imports load Keras on the chosen backend.
    with progress.status("Starting ..."):
        from keras_gemma.causal_lm.text_engine import create_text_engine
        from keras_gemma.cli.loading import find_name, load_model
        from keras_gemma.serving.server import bind
        from keras_gemma.serving.server import serve as run
        from keras_gemma.serving.settings import ServerSettings

    name = find_name(options, DEFAULT_CHAT_MODEL)
    settings = ServerSettings(
        served_names=tuple(served_name) or (default_name(name),),
        api_keys=keys,
        metrics_without_key=metrics_without_key,
        drain_seconds=drain,
        log_prompts=log_prompts,
        cors_origins=tuple(cors_origin),
        warm_up=True,
    )
    sock = bind(host, port)
    lm = load_model(options, name)
    limits = drop_none(
        max_length=max_length,
        max_batch_size=max_batch_size,
        max_queued_requests=max_queued_requests,
        max_queued_tokens=max_queued_tokens,
    )
    texts = create_text_engine(lm, pinned=pinned, **limits)
    address = sock.getsockname()[:2]
    scheme = "https" if ssl_certfile else "http"
    url_host = f"[{address[0]}]" if ":" in address[0] else address[0]
    print(f"{settings.served_names[0]}: {scheme}://{url_host}:{address[1]}", file=sys.stderr)
    ssl = drop_none(ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile)
    code = run(texts, settings, sock, root_path=root_path.rstrip("/"), **ssl)
    if code:
        print("error: the engine has failed", file=sys.stderr)
        raise typer.Exit(code)


def check_open(host: str) -> None:
    """Raises a BadParameter if a server without a key would be a mistake."""
    if API_KEY_VARIABLE in os.environ:
        raise BadParameter(
            f"the variable {API_KEY_VARIABLE} is empty. Set it to a key, or unset it",
            param_hint="--api-key",
        )
    if host not in LOCAL_HOSTS:
        raise BadParameter(
            f"everyone who reaches {host!r} could use the server. Pass --api-key, or --no-api-key "
            "to allow it",
            param_hint="--host",
        )


def read_keys(path: Path) -> list[str]:
    """Returns the keys in a file, one per line."""
    keys = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not keys:
        raise BadParameter(f"{path} has no key", param_hint="--api-key-file")
    return keys


def default_name(model: str) -> str:
    """Returns the served name of a model: that of its folder or file, if it is one."""
    path = Path(model)
    return path.resolve().name if path.exists() else model
