"""Memory estimate of a request, so that a request that is too large fails before any work.

The estimate is the maximum over the phases. With several sequences per prompt, they hold:

    prefill    keys and values of the prompt, for all its tokens in every layer
    repeat     these, and a copy for each sequence
    begin      the copies, and the ring buffers filled from them; beam search reorders all of these
    decode     the ring buffers; logits, and what a choice computes from them
    grow       the ring buffers, and longer ones
"""

import dataclasses

import keras

from keras_gemma import backend
from keras_gemma.config import BYTES_PER_ELEMENT, GemmaConfig
from keras_gemma.generation.buckets import MIN_CACHE_SLOTS, bucket, chunks
from keras_gemma.generation.request import Request
from keras_gemma.model.cache import slots_of_layers

FLOAT_BYTES = 4
"""Bytes of a float32 or an int32."""

LOGITS_ARRAYS = 5
"""Number of arrays `[B, V]` per choice: logits, processed logits, and temporary arrays."""

SAMPLING_LOGITS_ARRAYS = 9
"""Number of additional arrays `[B, V]` for random sampling: noise, and the filters' weights and
bits."""

CACHE_COPIES = {"torch": 0, "jax": 1, "tensorflow": 2}
"""Number of caches that a program of each backend may hold in addition to its input.

PyTorch writes in place. TensorFlow never frees its inputs."""

MARGIN = 1.2
"""Factor for allocator overhead and everything small."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of a request that determine its memory."""

    num_prompts: int
    num_return_sequences: int
    """Number of sequences per prompt."""
    prompt_length: int
    """Tokens in the longest prompt."""
    text_length: int
    """Maximum number of tokens per sequence, including the prompt."""
    is_random: bool = False
    """True if the sampler needs noise and filters."""
    reorders_cache: bool = False
    """True if rows, with their caches, replace one another, as in beam search."""
    copies_at_decode: bool = False
    """True if prompts are repeated when the ring buffers are filled, not before."""
    has_repetition_penalty: bool = False
    num_top_logprobs: int | None = None
    """Number of top log-probabilities per token. `None` disables log-probabilities."""
    num_draft_tokens: int = 0
    """Number of draft tokens per round."""


def workload_of(
    request: Request, reorders_cache: bool = False, copies_at_decode: bool = False
) -> Workload:
    """Returns the sizes of `request`."""
    is_greedy = request.sampler.structure() == "greedy"
    return Workload(
        num_prompts=len(request.prompts),
        num_return_sequences=request.num_return_sequences,
        prompt_length=max(map(len, request.prompts)),
        text_length=request.max_text_length(),
        is_random=not (reorders_cache or copies_at_decode or is_greedy),
        reorders_cache=reorders_cache,
        copies_at_decode=copies_at_decode,
        has_repetition_penalty=request.repetition_penalty is not None,
        num_top_logprobs=request.top_logprobs,
        num_draft_tokens=0 if request.draft is None else request.draft.num_tokens,
    )


def bytes_needed(work: Workload, config: GemmaConfig, dtype: str) -> int:
    """Returns the peak memory of generation, without the weights, in bytes.

    Args:
        work: Sizes of the request.
        config: Configuration of the model.
        dtype: Dtype of keys and values.
    """
    size = BYTES_PER_ELEMENT.get(dtype, FLOAT_BYTES)
    prompts, rows = work.num_prompts, work.num_prompts * work.num_return_sequences
    copies = CACHE_COPIES[keras.config.backend()]
    start, chunk = chunks(0, work.prompt_length, prompts)[-1]
    prompt_slots = bucket(max(start + chunk, work.prompt_length + 1), MIN_CACHE_SLOTS)
    chunk = chunks(0, work.prompt_length, prompts)[0][1]
    text_slots = max(
        prompt_slots, bucket(work.text_length + work.num_draft_tokens, MIN_CACHE_SLOTS)
    )
    heads = config.num_key_value_heads * config.head_dim

    def cache(batch: int, slots: list[int]) -> int:
        return 2 * batch * sum(slots) * heads * size

    def attention(batch: int, queries: int, slots: int) -> int:
        """Returns the bytes of one layer: logits and weights, and float32 keys and values."""
        logits = 3 * batch * queries * config.num_query_heads * slots
        return FLOAT_BYTES * (logits + 2 * batch * slots * heads)

    full = [prompt_slots] * config.num_layers
    rings = slots_of_layers(config, prompt_slots, work.num_draft_tokens)
    short_rings = [ring for ring in rings if ring < prompt_slots]
    grown_rings = slots_of_layers(config, text_slots, work.num_draft_tokens)
    width = (
        8 * config.hidden_dim
        + 4 * config.feed_forward_dim
        + 4 * config.num_query_heads * config.head_dim
    )
    begin_rows = prompts if work.copies_at_decode else rows

    arrays = LOGITS_ARRAYS + SAMPLING_LOGITS_ARRAYS * work.is_random
    arrays += 3 * work.has_repetition_penalty + 2 * (work.num_top_logprobs is not None)
    arrays += (2 + work.is_random) * work.num_draft_tokens
    logits = rows * config.vocabulary_size * FLOAT_BYTES * arrays
    logprobs = 0 if work.num_top_logprobs is None else 2 * (1 + 2 * work.num_top_logprobs)
    state = rows * text_slots * FLOAT_BYTES * (4 + logprobs)
    if work.has_repetition_penalty:
        state += rows * config.vocabulary_size
    if work.copies_at_decode:  # hidden states, and their directions
        state += 3 * prompts * text_slots * config.hidden_dim * FLOAT_BYTES

    prefill = cache(prompts, full) + attention(prompts, chunk, prompt_slots)
    prefill += prompts * chunk * width * FLOAT_BYTES
    repeat = cache(prompts, full) + (0 if work.copies_at_decode else cache(rows, full))
    begin = cache(begin_rows, full) + attention(rows, 1, prompt_slots) + logits
    begin += cache(rows, rings) if copies else cache(begin_rows, short_rings)
    if work.reorders_cache or work.copies_at_decode:
        begin += cache(begin_rows, short_rings) if copies else cache(rows, rings)
    decode = cache(rows, grown_rings) * (1 + work.reorders_cache + copies)
    decode += attention(rows, 1, text_slots) + logits
    grow = cache(rows, grown_rings) + (cache(rows, rings) if text_slots > prompt_slots else 0)
    return int(MARGIN * (state + max(prefill, repeat, begin, decode, grow)))


def check_memory(
    request: Request,
    config: GemmaConfig,
    dtype: str,
    reorders_cache: bool = False,
    copies_at_decode: bool = False,
) -> None:
    """Checks that a request fits into the free memory.

    Args:
        request: The request.
        config: Configuration of the model.
        dtype: Dtype of keys and values.
        reorders_cache: Same as in `Workload`.
        copies_at_decode: Same as in `Workload`.

    Raises:
        ValueError: If the estimate exceeds the free memory.
    """
    free, work = backend.free_memory(), workload_of(request, reorders_cache, copies_at_decode)
    needed = bytes_needed(work, config, dtype)
    if request.draft is not None and request.draft.programs is not None:
        needed += bytes_needed(work, request.draft.programs.config, dtype)
    if free is not None and needed > free:
        rows = work.num_prompts * work.num_return_sequences
        raise ValueError(
            f"{rows} rows need about {needed / 1e9:.1f} GB for keys, values and logits, but only "
            f"{free / 1e9:.1f} GB are free. Pass fewer prompts at a time, fewer beams or "
            "candidates, or a smaller `max_length`, `max_new_tokens` or `num_return_sequences`."
        )
