"""Settings of the server."""

import dataclasses
from pathlib import Path

PAGE_FOLDER = Path(__file__).parent / "page"
"""Folder of the chat page."""


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Settings of the server that do not belong to the engine."""

    served_names: tuple[str, ...] = ("gemma",)
    """Names of the model in requests. Responses have the first one."""
    api_keys: tuple[str, ...] = ()
    """Accepted API keys. Empty if no key is needed."""
    metrics_without_key: bool = False
    """True if `/metrics` needs no API key."""
    drain_seconds: float = 30.0
    """Seconds that running requests may take after SIGTERM."""
    max_body_bytes: int = 4_000_000
    """Maximum size of a request body."""
    max_choices: int = 256
    """Maximum number of sequences per HTTP request: prompts times `n` or `best_of`."""
    max_request_tokens: int = 1_000_000
    """Maximum number of new tokens per HTTP request: `max_tokens` times sequences."""
    log_prompts: bool = False
    """True if log lines contain the prompts."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the server. `*` allows all."""
    warm_up: bool = False
    """True if the server answers a request of its own before it is ready."""
    page_folder: Path = PAGE_FOLDER
    """Folder of the chat page. The page is left out if the folder does not exist."""
