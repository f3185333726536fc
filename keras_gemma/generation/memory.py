"""Memory estimate of a request, so that a request that is too large fails before any work.

The estimate is the maximum over the phases. With several sequences per prompt, they hold:

    prefill    keys and values of the prompt, for all its tokens in every layer
    repeat     these, and a copy for each sequence
    begin      the copies, and the ring buffers filled from them; beam search reorders all of these
    decode     the ring buffers; logits, and temporary arrays of sampling
    grow       the ring buffers, and longer ones
"""

import dataclasses

import keras

from keras_gemma import backend
from keras_gemma.config import BYTES_PER_ELEMENT, GemmaConfig
from keras_gemma.generation.prefill import capacity_for, chunks
from keras_gemma.generation.request import Request
from keras_gemma.model.backbone import GemmaBackbone
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
    rows_per_prompt: int
    """Number of sequences, beams or candidates per prompt."""
    prompt_length: int
    """Tokens in the longest prompt."""
    text_length: int
    """Maximum number of tokens per sequence, including the prompt."""
    strategy: str = "sample"
    """Strategy of the sampler. Beam search moves caches between rows, and contrastive search
    repeats prompts when the ring buffers are filled, not before."""
    num_logits_arrays: int = LOGITS_ARRAYS
    num_top_logprobs: int = 0
    num_draft_tokens: int = 0
    """Number of draft tokens per round."""


def workload_of(request: Request, config: GemmaConfig) -> Workload:
    """Returns the sizes of `request`."""
    strategy, rows_per_prompt = request.sampler.strategy, request.num_return_sequences
    if strategy == "contrastive":
        rows_per_prompt = min(request.sampler.k, config.vocabulary_size)
    is_random = strategy == "sample" and not request.sampler.is_greedy
    num_draft_tokens = 0 if request.draft is None else request.draft.num_tokens
    arrays = LOGITS_ARRAYS + SAMPLING_LOGITS_ARRAYS * is_random
    arrays += 4 * (request.repetition_penalty is not None) + 2 * (request.top_logprobs is not None)
    arrays += 3 * request.has_counts
    return Workload(
        num_prompts=len(request.prompts),
        rows_per_prompt=rows_per_prompt,
        prompt_length=max(map(len, request.prompts)),
        text_length=request.max_text_length(),
        strategy=strategy,
        num_logits_arrays=arrays + (2 + is_random) * num_draft_tokens,
        num_top_logprobs=request.top_logprobs or 0,
        num_draft_tokens=num_draft_tokens,
    )


def bytes_needed(work: Workload, config: GemmaConfig, dtype: str) -> int:
    """Returns the peak memory of generation with keys and values in `dtype`, without the weights,
    in bytes."""
    size = BYTES_PER_ELEMENT.get(dtype, FLOAT_BYTES)
    prompts, rows = work.num_prompts, work.num_prompts * work.rows_per_prompt
    copies = CACHE_COPIES[keras.config.backend()]
    (_, chunk), *_ = spans = chunks(0, work.prompt_length, prompts)
    prompt_slots = capacity_for(max(sum(spans[-1]), work.prompt_length + 1))
    text_slots = capacity_for(work.text_length + work.num_draft_tokens)
    text_slots = max(prompt_slots, text_slots)
    heads = config.num_key_value_heads * config.head_dim
    is_beam, is_contrastive = work.strategy == "beam", work.strategy == "contrastive"

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
    width = 8 * config.hidden_dim + 4 * config.feed_forward_dim
    width += 4 * config.num_query_heads * config.head_dim
    logits = rows * config.vocabulary_size * FLOAT_BYTES * work.num_logits_arrays
    state = rows * text_slots * FLOAT_BYTES * (6 + 4 * work.num_top_logprobs)
    if is_contrastive:  # hidden states, and their directions
        state += 3 * prompts * text_slots * config.hidden_dim * FLOAT_BYTES

    prefill = cache(prompts, full) + attention(prompts, chunk, prompt_slots)
    prefill += prompts * chunk * width * FLOAT_BYTES
    begin_rows = prompts if is_contrastive else rows
    repeat = cache(prompts, full) + cache(begin_rows, full)
    begin = cache(begin_rows, full) + attention(rows, 1, prompt_slots) + logits
    begin += cache(begin_rows, short_rings)
    if copies or is_beam or is_contrastive:
        begin += cache(rows, rings)
    decode = cache(rows, grown_rings) * (1 + is_beam + copies)
    decode += attention(rows, 1, text_slots) + logits
    grow = cache(rows, grown_rings) + (cache(rows, rings) if text_slots > prompt_slots else 0)
    return int(MARGIN * (state + max(prefill, repeat, begin, decode, grow)))


def check_memory(request: Request, backbone: GemmaBackbone) -> None:
    """Raises a ValueError if the estimate for `request` exceeds the free memory."""
    free, work = backend.free_memory(), workload_of(request, backbone.config)
    configs = [backbone.config]
    if request.draft is not None and request.draft.programs is not None:
        configs.append(request.draft.programs.config)
    needed = sum(bytes_needed(work, config, backbone.compute_dtype) for config in configs)
    if free is not None and needed > free:
        raise ValueError(
            f"{work.num_prompts * work.rows_per_prompt} rows need about {needed / 1e9:.1f} GB for "
            f"keys, values and logits, but only {free / 1e9:.1f} GB are free. Pass fewer prompts "
            "at a time, fewer beams or candidates, or a smaller `max_length`, `max_new_tokens` or "
            "`num_return_sequences`."
        )
