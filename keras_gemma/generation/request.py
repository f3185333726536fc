"""A request, a prefix cache, and the output of each sequence: ids, never text."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.checks import check_integer
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.engine_request import TokenConstraint
from keras_gemma.generation.samplers import Sampler
from keras_gemma.generation.samplers.noise import hash_ids
from keras_gemma.generation.samplers.sampler import LogitsProcessor, Numbers, Seeds
from keras_gemma.generation.stopping import check_stop_token_ids
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.cache import Cache

MAX_DRAFT_TOKENS = 32
"""Maximum number of draft tokens per round. The compiled program grows with the number."""


@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """KV cache of the beginning of a text. Prompts that share it skip its prefill.

    The cache is valid only for the model that computed it, with unchanged weights. Changed weights
    are detected by `weights_fingerprint`, which sees `load_weights` and nearly every `fit`. After
    any other change of the weights, call `prefill` again.
    """

    ids: np.ndarray
    """Cached tokens, int32 `[n]`."""
    cache: Cache
    """Keys and values `[1, S, K, H]` of each layer, by position; S is at least n."""
    backbone_ref: Any = None
    """Weak reference to the backbone that computed the cache."""
    fingerprint: bytes = b""
    """`weights_fingerprint` of the backbone at that time."""
    min_shared_tokens: int = 0
    """Minimum number of cached tokens that a prompt must share.

    A sliding-window cache that has wrapped around cannot be truncated to a shorter prefix."""

    def matches(self, backbone: GemmaBackbone) -> bool:
        """Returns True if `backbone` computed this cache with its current weights."""
        return self._is_from(backbone) and self.fingerprint == weights_fingerprint(backbone)

    def check(self, backbone: GemmaBackbone) -> None:
        """Raises a ValueError if another model computed the cache, or the weights have changed."""
        if not self._is_from(backbone):
            raise ValueError(
                "`prefix` was computed by another model, so its keys and values are invalid here. "
                "Call `prefill` on the model that generates."
            )
        if not self.matches(backbone):
            raise ValueError(
                "`prefix` was computed with other weights: the model has been trained, loaded or "
                "converted since. Call `prefill` again."
            )

    def _is_from(self, backbone: GemmaBackbone) -> bool:
        return self.backbone_ref is not None and self.backbone_ref() is backbone

    def num_shared_tokens(self, prompts: list[np.ndarray]) -> int:
        """Returns the number of cached tokens that all prompts share, or 0 if it is too small.

        At least one token of each prompt is left to prefill.
        """
        shared = len(self.ids)
        for prompt in prompts:
            length = min(shared, len(prompt) - 1)
            mismatches = np.flatnonzero(self.ids[:length] != prompt[:length])
            shared = int(mismatches[0]) if len(mismatches) else length
        return shared if shared >= self.min_shared_tokens else 0


def weights_fingerprint(backbone: GemmaBackbone) -> bytes:
    """Returns bytes that most changes of the weights change, at little cost.

    Covers the shape and dtype of all weights, the values of the last norm, the active adapter and
    the values of its last matrix.
    """
    layouts = [f"{tuple(weight.shape)} {weight.dtype}" for weight in backbone.weights]
    layouts.append(f"{backbone.adapters.active} {backbone.adapters.merged}")
    variables = [backbone.layer_norm.scale]
    if backbone.adapters.active is not None:
        *_, linear = backbone.adapters.linears(backbone.adapters.active).values()
        variables.append(linear.low_ranks[backbone.adapters.active].b)
    arrays = [ops.convert_to_numpy(ops.cast(variable.value, "float32")) for variable in variables]
    return "\n".join(layouts).encode() + b"".join(array.tobytes() for array in arrays)


@dataclasses.dataclass(frozen=True)
class Draft:
    """Draft settings for speculative decoding."""

    num_tokens: int
    """Number of draft tokens per round, at least 1."""
    programs: Any = None
    """`Programs` of the draft model. `None` means prompt-lookup decoding."""
    tokenizer: Any = None
    """Tokenizer of the draft model, if it has one. Not used here."""

    def check(self, config: GemmaConfig, max_text_length: int, sampler: Sampler) -> None:
        """Raises a ValueError if the draft does not suit a target model of `config`."""
        check_integer("num_draft_tokens", self.num_tokens, 1, MAX_DRAFT_TOKENS)
        if not sampler.has_known_probabilities:
            raise ValueError(
                "`draft` needs a sampler whose probabilities are known: 'greedy', 'random', "
                "'top_k', 'top_p' or 'min_p'. Leave out `draft`, or pass one of them as `sampler`. "
                f"Received: {type(sampler).__name__}"
            )
        if self.programs is None:
            return
        draft = self.programs.config
        if draft.vocabulary_size != config.vocabulary_size:
            raise ValueError(
                "`draft` must have the vocabulary size of the target model, "
                f"{config.vocabulary_size}. Pass a model of the same family, or draft='prompt'. "
                f"Received: a draft with vocabulary size {draft.vocabulary_size}"
            )
        if draft.context_length < max_text_length:
            raise ValueError(
                f"`draft` has a context length of {draft.context_length}, but the texts may have "
                f"{max_text_length} tokens. Change `max_length` or `max_new_tokens`, or pass "
                "draft='prompt'."
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts and how to continue them."""

    prompts: list[np.ndarray]
    """Non-empty token ids of each prompt, int32 `[T]`."""
    max_new_tokens: list[int]
    """Maximum number of new tokens of each prompt, at least 1."""
    sampler: Sampler
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a sequence, and are its last token."""
    seed: Seeds = None
    """Random seed. `None` uses the seed of the sampler."""
    num_return_sequences: int = 1
    """Number of sequences per prompt."""
    repetition_penalty: Numbers | None = None
    frequency_penalty: Numbers | None = None
    presence_penalty: Numbers | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    top_logprobs: int | None = None
    """Number of top log-probabilities per token. `None` disables log-probabilities."""
    prefix: PrefixCache | None = None
    draft: Draft | None = None
    constraint: Callable[[], TokenConstraint] | None = None
    """Function that returns a new constraint, called once per sequence. Excludes `draft`, and
    samplers of other strategies than `"sample"`."""

    @property
    def has_counts(self) -> bool:
        """True if a penalty needs the number of occurrences of each new token."""
        return self.frequency_penalty is not None or self.presence_penalty is not None

    def check(self, config: GemmaConfig) -> None:
        """Raises a ValueError if a model of `config` cannot answer the request."""
        context = config.context_length
        if not self.prompts:
            raise ValueError("There must be at least one prompt. Received: an empty list")
        check_stop_token_ids(self.stop_token_ids)
        for i, (prompt, count) in enumerate(zip(self.prompts, self.max_new_tokens, strict=True)):
            if not len(prompt):
                raise ValueError(
                    f"Prompt {i} has no tokens. Pass at least one, such as the start token."
                )
            if count < 1 or len(prompt) + count > context:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens, but the context length is "
                    f"{context}. With the new tokens, there must be at most {context} tokens in "
                    "all, and at least one new token. Shorten the prompt, or allow fewer new "
                    f"tokens. Received: up to {count} new tokens"
                )
        if self.draft is not None:
            self.draft.check(config, self.max_text_length(), self.sampler)

    def max_text_length(self) -> int:
        """Returns the maximum number of tokens per sequence, including the prompt."""
        pairs = zip(self.prompts, self.max_new_tokens, strict=True)
        return max(len(prompt) + count for prompt, count in pairs)

    def num_prefill_tokens(self) -> int:
        """Returns the number of prompt tokens that `prefix` does not hold, over all prompts."""
        shared = 0 if self.prefix is None else self.prefix.num_shared_tokens(self.prompts)
        return sum(len(prompt) - shared for prompt in self.prompts)

    def row_keys(self) -> np.ndarray:
        """Returns the key that separates the random numbers of rows with one seed, int32 `[B]`.

        A hash of the prompt, plus the index of the row among the rows of equal prompt and seed. The
        numbers of a row therefore depend on its prompt, and not on the rest of the batch.
        """
        seeds = self.sampler.seed if self.seed is None else self.seed
        seeds = np.ravel(np.array(seeds, object))
        hashes = [hash_ids(prompt) for prompt in self.prompts]
        rows = len(self.prompts) * self.num_return_sequences
        counts: Counter[Any] = Counter()
        keys = np.zeros(rows, "uint32")
        for row in range(rows):
            seed = seeds[row * len(seeds) // rows]
            prompt = hashes[row // self.num_return_sequences]
            equal = prompt, None if seed is None else int(seed) % 2**32
            keys[row] = (prompt + counts[equal]) % 2**32
            counts[equal] += 1
        return keys.view("int32")


@dataclasses.dataclass(frozen=True)
class SequenceOutput:
    """Output of one generated sequence."""

    ids: np.ndarray
    """New tokens, int32 `[n]`."""
    stopped: bool
    """True if the sequence ended with a stop token, not at its maximum length."""
    logprobs: np.ndarray | None = None
    """Log-probabilities of the new tokens in nats, float32 `[n]`."""
    top_ids: np.ndarray | None = None
    """Top-k tokens at each position, int32 `[n, k]`."""
    top_logprobs: np.ndarray | None = None
    """Log-probabilities of `top_ids`, float32 `[n, k]`."""
    acceptance_rate: float | None = None
    """Share of the verified draft tokens that were accepted."""
    score: float | None = None
    """Score of beam search."""
