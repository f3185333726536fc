"""Answer token of patching and attribution: its id and its log-probability."""

from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.losses import cross_entropy
from keras_gemma.model.hooks import Hooks
from keras_gemma.model.transformer import hidden_states
from keras_gemma.scoring.forward import constant_weights, logits_of
from keras_gemma.scoring.inputs import read_integer, tokens_of
from keras_gemma.text.preprocessor import require_preprocessor


def log_probability(lm: Any, texts: np.ndarray, answer_id: int, hooks: Hooks = None) -> Any:
    """Returns the log-probability of the answer after each of `texts [B, T]`.

    Returns:
        float32 `[B]`, in nats.
    """
    config, weights = lm.backbone.config, constant_weights(lm.backbone)
    mask = ops.ones(texts.shape, dtype="bool")
    texts = backend.to_tensor(texts)
    x = hidden_states(weights, texts, mask, config, lm.backbone.compute_dtype, hooks)
    answers = ops.full(texts.shape[:1], answer_id, dtype="int32")
    return -cross_entropy(logits_of(x[:, -1], weights, config), answers)


def read_answer(lm: Any, answer: Any) -> int:
    """Returns the id of an answer that is a string of one token or an id.

    Raises:
        ValueError: If the string has several tokens or the id is not in the vocabulary.
    """
    if not isinstance(answer, str):
        last = lm.backbone.config.vocabulary_size - 1
        return read_integer("answer", answer, 0, last, "It may also be a string of one token.")
    require_preprocessor(lm.preprocessor, f"answer={answer!r}", "Pass the id of the token")
    ids = lm.preprocessor.tokenizer.tokenize(answer, parse_special=False)
    if len(ids) != 1:
        raise ValueError(
            "`answer` must be one token. A space before a word is part of its token. Control "
            "tokens must be passed as ids. "
            f"Received: answer={answer!r}, which has the tokens {tokens_of(lm, ids)}"
        )
    return int(ids[0])
