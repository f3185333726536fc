"""What a request will take of memory, so that one too large is refused before any work."""

import math

from keras_gemma import backend
from keras_gemma.config import BYTES_PER_ELEMENT, GemmaConfig
from keras_gemma.generation.request import Request


def bytes_needed(request: Request, config: GemmaConfig, dtype: str) -> int:
    """Bytes of a request's caches at their longest, and of its logits."""
    pairs = zip(request.prompts, request.room, strict=True)
    longest = max(len(prompt) + most for prompt, most in pairs)
    rows = len(request.prompts) * request.copies
    length = 1 << math.ceil(math.log2(longest))  # caches grow by doubling
    dtype = dtype if dtype in BYTES_PER_ELEMENT else "float32"
    places, caches = 1, config.cache_bytes(rows, length, dtype)
    if request.draft is not None:
        places = 2 * request.draft.tokens + 1
        if request.draft.generator is not None:
            caches += request.draft.generator.config.cache_bytes(rows, length, dtype)
    logits = (2 + places) * rows * config.vocabulary_size * BYTES_PER_ELEMENT["float32"]
    return caches + int(logits)


def check_memory(request: Request, config: GemmaConfig, dtype: str) -> None:
    """Raise a ValueError where `request` cannot fit into the memory that is free."""
    free = backend.free_memory()
    needed = bytes_needed(request, config, dtype)
    if free is not None and needed > free:
        raise ValueError(
            f"{len(request.prompts) * request.copies} rows need about {needed / 1e9:.1f} GB for "
            f"keys, values and logits, and {free / 1e9:.1f} GB are free. Pass fewer prompts at a "
            "time, or a smaller `max_length`, `max_new_tokens`, `num_return_sequences`, or fewer "
            "beams or candidates."
        )
