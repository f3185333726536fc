"""Log-probabilities of continuations: of the choices of a question, or the next words of prompts.

All prompts and continuations are read as one tree of tokens (`token_tree.py`): a prompt once for
all of its continuations, and what prompts share, such as examples, once for all of them. The head
runs only where a token is scored, and each position once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.buckets import bucket
from keras_gemma.config import LayerKind
from keras_gemma.losses import MAX_SCORED_LOGITS, chunk_length
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.cache import Cache, make_cache
from keras_gemma.model.head import final_norm, soft_cap
from keras_gemma.model.transformer import embed_tokens, run_blocks
from keras_gemma.scoring.forward import CompiledScorer
from keras_gemma.scoring.inputs import check_length, encode_one
from keras_gemma.scoring.token_tree import Chunk, TokenTree, token_tree
from keras_gemma.text.batches import is_text
from keras_gemma.text.inputs import as_str, to_ids
from keras_gemma.text.preprocessor import require_preprocessor

CHUNK_TOKENS = 256
"""Number of tokens that are read together."""

MIN_PATH_SLOTS = 128
"""Minimum number of cache slots for the tokens that were read before a chunk."""

MAX_PATH_STEP = 512
"""Largest step between two sizes of the cache. Every size compiles a program."""


SLOT_STEP = 256
"""Step between two numbers of slots of local layers. Every number compiles a program."""


class ContinuationScore(NamedTuple):
    """Score of one continuation."""

    log_probability: float
    """Sum of the log-probabilities of its tokens, each given all tokens before it, in nats."""
    is_greedy: bool
    """True if greedy search writes this text: no other token is more likely than any of its own."""
    num_tokens: int
    """Number of tokens of the continuation."""


class ContinuationScorer(CompiledScorer):
    """Scoring of continuations."""

    def __init__(self, backbone: GemmaBackbone) -> None:
        super().__init__(backbone)
        vocabulary_size = self.config.vocabulary_size
        self.max_rows = chunk_length(1, CHUNK_TOKENS, vocabulary_size, MAX_SCORED_LOGITS)
        self.max_pairs = 2 * self.max_rows  # choices share the row of their first token

    def score(
        self,
        pairs: Sequence[tuple[np.ndarray, np.ndarray]],
        report: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """Yields the index and the score of each pair as soon as it is known, in any order.

        Args:
            pairs: Ids of a prompt and ids of its continuation, int32 `[n]`. Neither is empty.
            report: Called with the number of tokens after each chunk.
        """
        texts = [np.concatenate(pair).astype("int32") for pair in pairs]
        tree = token_tree(texts, [len(continuation) for _, continuation in pairs])
        left = np.array([len(continuation) for _, continuation in pairs])
        sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), "bool")
        for span, log_probabilities, hits in self._scored_pairs(tree, report):
            owners = tree.texts[span]
            np.add.at(sums, owners, log_probabilities)
            np.logical_and.at(greedy, owners, hits)
            np.subtract.at(left, owners, 1)
            for i in np.unique(owners[left[owners] == 0]):
                score = ContinuationScore(float(sums[i]), bool(greedy[i]), len(pairs[i][1]))
                yield int(i), score

    def _scored_pairs(
        self, tree: TokenTree, report: Callable[[int], None]
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yields log-probabilities and hits of all scored pairs of the tree, span by span."""
        weights = self.backbone.tensors()
        waiting = np.zeros((0, self.config.hidden_dim), "float32")  # one row per scored node
        rows = np.zeros(0, "int32")  # the row of each pair that waits
        end = 0
        for chunk, x in self._read(tree, weights):
            nodes, inverse = np.unique(tree.nodes[chunk.pairs], return_inverse=True)
            rows = np.concatenate([rows, len(waiting) + inverse.astype("int32")])
            waiting = np.concatenate([waiting, x[nodes - chunk.first]])
            report(len(chunk.token_ids))
            is_last = chunk.first + len(chunk.token_ids) == tree.num_nodes
            while len(rows) and (
                is_last or len(waiting) >= self.max_rows or len(rows) >= self.max_pairs
            ):
                count = min(self.max_pairs, int(np.searchsorted(rows, self.max_rows)))
                span = slice(end, end + count)
                own, rows = np.split(rows, [count])
                yield span, *self._head(weights, waiting[: own[-1] + 1], own, tree.targets[span])
                end = span.stop
                done = rows[0] if len(rows) else len(waiting)
                waiting, rows = waiting[done:], rows - done

    def _head(
        self, weights: Any, x: np.ndarray, rows: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-probability and the hit of each target, given its row of `x [n, D]`."""
        x = np.pad(x, ((0, bucket(len(x)) - len(x)), (0, 0)))
        padding = (0, self.max_pairs - len(rows))
        run = self.program("head", self._head_program)
        results = run(
            weights["head"],
            ops.convert_to_tensor(x, self.backbone.compute_dtype),
            backend.to_tensor(np.pad(rows, padding)),
            backend.to_tensor(np.pad(targets, padding)),
        )
        log_probabilities, hits = (backend.to_numpy(array)[: len(rows)] for array in results)
        return log_probabilities.astype("float64"), hits.astype("bool")

    def _head_program(self, head: Any, x: Any, rows: Any, targets: Any) -> tuple[Any, Any]:
        products, cap = backend.matmul(x, head["token_embedding"]), self.config.final_logit_soft_cap
        totals, largest = backend.log_sum_and_max(products, cap)
        flat = ops.reshape(products, (-1,))
        chosen = ops.take(flat, rows * products.shape[1] + targets)
        chosen = soft_cap(ops.cast(chosen, "float32"), cap)
        return chosen - ops.take(totals, rows), chosen >= ops.take(largest, rows)

    def _read(self, tree: TokenTree, weights: Any) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Yields each chunk of the tree with the input of the head at its nodes, `[T, D]`."""
        move = self.program("move", _move)
        cache: Cache | None = None
        path_slots = 0
        for chunk in tree.chunks(CHUNK_TOKENS):
            path = np.where(chunk.path >= 0, chunk.path, path_slots - 1 - chunk.path)
            path_slots = bucket(max(1, len(path)), MIN_PATH_SLOTS, MAX_PATH_STEP)
            length = bucket(len(chunk.token_ids))
            if cache is None:
                slots = path_slots + length
                cache = make_cache(self.config, 1, slots, self.backbone.compute_dtype)
            else:
                path = np.pad(path, (0, path_slots + length - len(path)))
                cache = move(cache, backend.to_tensor(path.astype("int32")))
            padding = (0, length - len(chunk.token_ids))
            visible = np.pad(chunk.visible, padding)
            np.fill_diagonal(visible, True)
            arrays = [*(np.pad(array, padding) for array in chunk[:3]), visible]
            count = self._visible_slots(path_slots + length, int(chunk.positions.min()))
            read = self.program(f"read {count}", partial(self._read_program, count), donate=1)
            x, cache = read(weights, cache, *(backend.to_tensor(array[None]) for array in arrays))
            yield chunk, backend.to_numpy(x).astype("float32")

    def _visible_slots(self, slots: int, position: int) -> int | None:
        """Returns the number of slots, at the end of the cache, that local layers can see from
        `position` on. `None` if they can see all slots."""
        if not self.config.use_sliding_window_attention:
            return None
        window = self.config.sliding_window_size
        unseen = max(0, position - window + 1) // SLOT_STEP * SLOT_STEP
        return slots - unseen if unseen else None

    def _read_program(
        self,
        local_slots: int | None,
        weights: Any,
        cache: Cache,
        token_ids: Any,
        positions: Any,
        shared: Any,
        visible: Any,
    ) -> tuple[Any, Cache]:
        """Reads a chunk, `[1, T]`, into the last T slots of the cache.

        `local_slots` is the result of `_visible_slots`.
        """
        config, length = self.config, token_ids.shape[1]
        path_slots = cache[0][0].shape[1] - length
        depths = ops.arange(path_slots, dtype="int32")[None]
        key_positions = ops.concatenate([depths, positions], axis=1)[:, None, :]
        on_path = depths[:, None, :] < shared[:, :, None]
        seen = ops.concatenate([on_path, visible], axis=2)

        def mask_of(kind: LayerKind, slots: Any) -> Any:
            if kind.window is None:
                return seen
            visible = ops.logical_and(seen, key_positions > positions[:, :, None] - kind.window)
            return visible if local_slots is None else visible[:, :, slots - local_slots :]

        def first_slot_of(kind: LayerKind, slots: Any) -> Any:
            is_short = kind.window is not None and local_slots is not None
            return slots - local_slots if is_short else None

        x, cache = run_blocks(
            embed_tokens(weights, token_ids, config, self.backbone.compute_dtype),
            weights["layers"],
            config,
            positions,
            mask_of,
            cache,
            lambda slots: ops.arange(path_slots, slots, dtype="int32")[None],
            first_slot_of=first_slot_of,
        )
        return final_norm(x, weights["head"], config)[0], cache


def _move(cache: Cache, source: Any) -> Cache:
    """Returns the cache whose slots are copies of the slots `source [R]`."""
    return [tuple(ops.take(array, source, axis=1) for array in pair) for pair in cache]


def encode_pair(
    encode: Callable[[str], list[int]], prompt: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Returns the ids of a prompt, which must not be empty, and those of its continuation.

    White space at the end of the prompt is moved to the continuation, because the token of a word
    includes the space before it. The ids of the continuation are those after the prompt's in the
    whole text, as in lm-evaluation-harness.

    Args:
        encode: Function that returns the ids of a text.
        prompt: The prompt.
        continuation: The continuation.
    """
    end = len(prompt.rstrip())
    if end:
        prompt, continuation = prompt[:end], prompt[end:] + continuation
    ids, whole = encode(prompt), encode(prompt + continuation)
    if len(whole) > len(ids):
        return ids, whole[len(ids) :]
    # The continuation is part of the prompt's last token, so this token is scored.
    same = [a == b for a, b in zip(ids, whole, strict=False)]
    shared = [*same, False].index(False)
    return whole[:shared], whole[shared:]


def score_continuations(lm: Any, prompts: Any, continuations: Any) -> list[ContinuationScore]:
    """Implements `GemmaCausalLM.score_continuations`."""
    for name, value in (("prompts", prompts), ("continuations", continuations)):
        if is_text(value) or not hasattr(value, "__len__"):
            raise TypeError(f"`{name}` must be a list. Received: {value!r:.80}")
    if len(prompts) != len(continuations):
        raise ValueError(
            "`prompts` and `continuations` must have the same length. Received: "
            f"{len(prompts)} and {len(continuations)}"
        )
    encode = lru_cache(2)(lambda text: encode_one(lm, text).tolist())
    pairs = []
    for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        names = f"prompts[{i}]", f"continuations[{i}]"
        pairs.append(_read_pair(lm, encode, prompt, continuation, names))
    scores = dict(lm.continuation_scorer.score(pairs))
    return [scores[i] for i in range(len(pairs))]


def choose(lm: Any, prompt: Any, choices: Any) -> np.ndarray:
    """Implements `GemmaCausalLM.choose`."""
    if is_text(choices) or not hasattr(choices, "__len__"):
        raise TypeError(f"`choices` must be a list. Received: {choices!r:.80}")
    if len(choices) == 0:
        raise ValueError("`choices` must have at least one choice. Received: an empty list")
    scores = score_continuations(lm, [prompt] * len(choices), choices)
    return np.array([score.log_probability for score in scores])


def _read_pair(
    lm: Any,
    encode: Callable[[str], list[int]],
    prompt: Any,
    continuation: Any,
    names: tuple[str, str],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of a prompt and its continuation, each a string or a list of ids, checked."""
    ids: Any
    scored: Any
    if is_text(prompt) and is_text(continuation) and len(as_str(prompt)) > 0:
        ids, scored = encode_pair(encode, as_str(prompt), as_str(continuation))
    else:
        ids = encode_one(lm, prompt, names[0])
        if is_text(continuation):
            require_preprocessor(lm.preprocessor)
            (scored,) = lm.preprocessor.tokenizer.encode([as_str(continuation)])
        else:
            scored = to_ids(names[1], continuation, 1, lm.backbone.config.vocabulary_size)
    if len(scored) == 0:
        raise ValueError(
            f"`{names[1]}` must have at least one token. Received: {continuation!r:.80}"
        )
    check_length(" and ".join(names), len(ids) + len(scored) - 1, lm.backbone.config)
    return np.array(ids, "int32"), np.array(scored, "int32")
