"""Numbers of an engine, for metrics."""

import dataclasses


@dataclasses.dataclass
class EngineStats:
    """Numbers of an engine: those of now, and totals since its start."""

    num_running: int = 0
    """Requests whose prompt is being read, or that have a slot."""
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    slots_used: int = 0
    slots_total: int = 0
    prefix_cache_bytes: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens that were looked up."""
    prefix_cache_hits: int = 0
    """Prompt tokens that were found."""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    """Decode steps."""
    step_seconds: float = 0.0
    """Time of all turns."""
    num_cancelled: int = 0
    num_restarts: int = 0
    """Times that the decode state was rebuilt after an error."""
