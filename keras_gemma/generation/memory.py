"""What a request will take of memory, so that one too large is refused before any work.

The most that any part of the work holds at once. A request for several texts of one prompt:

    read      the prompt's keys and values, of all its tokens in every layer
    repeat    these, and a copy for each text
    begin     the copies, and the rings made of them; beam search moves all of these
    decode    the rings; logits, and what a choice makes of them
    grow      the rings, and longer ones
"""

import dataclasses

import keras

from keras_gemma import backend
from keras_gemma.config import BYTES_PER_ELEMENT, GemmaConfig
from keras_gemma.generation.buckets import SMALLEST_CACHE, bucket, chunks
from keras_gemma.generation.request import Request
from keras_gemma.model.cache import slots_of_layers

FLOAT = 4
"""Bytes of a float32 or an int32."""

LOGITS_OF_A_CHOICE = 5
"""Arrays [B, V] that choosing a token makes: logits, as they are and processed, and temporary."""

LOGITS_OF_A_DRAW = 9
"""More of them where it is drawn: noise, and the filters' weights and bits."""

COPIES = {"torch": 0, "jax": 1, "tensorflow": 2}
"""Caches that a program of each backend may hold beside the one it is given: PyTorch writes in
place, TensorFlow gives up nothing that it was given."""

MARGIN = 1.2
"""What allocators lose, and all that is small."""


@dataclasses.dataclass(frozen=True)
class Load:
    """The sizes of a request, by which its memory is estimated."""

    prompts: int
    """How many."""
    copies: int
    """Rows for each prompt."""
    prompt: int
    """Tokens of the longest prompt."""
    text: int
    """Tokens of the longest text, prompt included."""
    draws: bool = False
    """Whether the choice needs noise and filters."""
    moves: bool = False
    """Whether rows take each other's place, with their caches, as beams do."""
    late: bool = False
    """Whether rows are copied when rings are made, and not before."""
    penalised: bool = False
    """Whether it is noted which tokens are in the text."""
    noted: int | None = None
    """How many of the likeliest tokens are noted at each place."""
    guesses: int = 0
    """Tokens that are guessed at a time."""


def load_of(request: Request, moves: bool = False, late: bool = False) -> Load:
    """The sizes of `request`."""
    pairs = list(zip(request.prompts, request.room, strict=True))
    return Load(
        prompts=len(pairs),
        copies=request.copies,
        prompt=max(len(prompt) for prompt, _ in pairs),
        text=max(len(prompt) + most for prompt, most in pairs),
        draws=not (moves or late or request.sampler.structure() == "greedy"),
        moves=moves,
        late=late,
        penalised=request.repetition_penalty is not None,
        noted=request.top_log_probabilities,
        guesses=0 if request.draft is None else request.draft.tokens,
    )


def bytes_needed(load: Load, config: GemmaConfig, dtype: str) -> int:
    """The most bytes that generation holds at once, weights left out.

    Args:
        load: what is generated.
        config: the model's sizes.
        dtype: of keys and values.
    """
    size = BYTES_PER_ELEMENT.get(dtype, FLOAT)
    rows, copies = load.prompts * load.copies, COPIES[keras.config.backend()]
    start, chunk = chunks(0, load.prompt, load.prompts)[-1]
    read = bucket(max(start + chunk, load.prompt + 1), SMALLEST_CACHE)
    chunk = chunks(0, load.prompt, load.prompts)[0][1]
    end = max(read, bucket(load.text + load.guesses, SMALLEST_CACHE))
    heads = config.num_key_value_heads * config.head_dim

    def cache(batch: int, slots: list[int]) -> int:
        return 2 * batch * sum(slots) * heads * size

    def attention(batch: int, places: int, slots: int) -> int:
        """Of one layer: logits and weights, and keys and values in float32."""
        logits = 3 * batch * places * config.num_query_heads * slots
        return FLOAT * (logits + 2 * batch * slots * heads)

    every, rings = [read] * config.num_layers, slots_of_layers(config, read, load.guesses)
    new = [ring for ring in rings if ring < read]
    longest = slots_of_layers(config, end, load.guesses)
    width = (
        8 * config.hidden_dim
        + 4 * config.feed_forward_dim
        + 4 * config.num_query_heads * config.head_dim
    )
    made = load.prompts if load.late else rows

    arrays = LOGITS_OF_A_CHOICE + LOGITS_OF_A_DRAW * load.draws + 3 * load.penalised
    arrays += 2 * (load.noted is not None) + (2 + load.draws) * load.guesses
    logits = rows * config.vocabulary_size * FLOAT * arrays
    kept = rows * end * FLOAT * (4 + (0 if load.noted is None else 2 * (1 + 2 * load.noted)))
    if load.penalised:
        kept += rows * config.vocabulary_size
    if load.late:  # hidden states, and their directions
        kept += 3 * load.prompts * end * config.hidden_dim * FLOAT

    reading = cache(load.prompts, every) + attention(load.prompts, chunk, read)
    reading += load.prompts * chunk * width * FLOAT
    repeating = cache(load.prompts, every) + (0 if load.late else cache(rows, every))
    beginning = cache(made, every) + attention(rows, 1, read) + logits
    beginning += cache(rows, rings) if copies else cache(made, new)
    if load.moves or load.late:
        beginning += cache(made, new) if copies else cache(rows, rings)
    decoding = cache(rows, longest) * (1 + load.moves + copies)
    decoding += attention(rows, 1, end) + logits
    growing = cache(rows, longest) + (cache(rows, rings) if end > read else 0)
    return int(MARGIN * (kept + max(reading, repeating, beginning, decoding, growing)))


def check_memory(
    request: Request, config: GemmaConfig, dtype: str, moves: bool = False, late: bool = False
) -> None:
    """Raise a ValueError where `request` cannot fit into the memory that is free.

    Args:
        moves, late: as of `Load`.
    """
    free, load = backend.free_memory(), load_of(request, moves, late)
    needed = bytes_needed(load, config, dtype)
    if request.draft is not None and request.draft.generator is not None:
        needed += bytes_needed(load, request.draft.generator.config, dtype)
    if free is not None and needed > free:
        raise ValueError(
            f"{load.prompts * load.copies} rows need about {needed / 1e9:.1f} GB for "
            f"keys, values and logits, and {free / 1e9:.1f} GB are free. Pass fewer prompts at a "
            "time, or a smaller `max_length`, `max_new_tokens`, `num_return_sequences`, or fewer "
            "beams or candidates."
        )
