"""Stop tokens: token ids that end a sequence.

Deals only in ids, like all of `generation/`. A stop string can end in the middle of a token and is
found in decoded text: `text/stream.py` finds it, and `causal_lm/text_request.py` then calls
`DecodingSession.stop`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

MAX_STOP_TOKEN_IDS = 8
"""Maximum number of stop tokens. Programs take an array of this size, so new ids compile
nothing."""


def check_stop_token_ids(stop_token_ids: Sequence[int]) -> None:
    """Raises a ValueError if there are more than `MAX_STOP_TOKEN_IDS` stop tokens."""
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(
            f"`stop_token_ids` must have at most {MAX_STOP_TOKEN_IDS} ids. "
            f"Received: stop_token_ids={tuple(stop_token_ids)}"
        )


def stop_array(stop_token_ids: Sequence[int]) -> np.ndarray:
    """Returns stop tokens as int32 `[MAX_STOP_TOKEN_IDS]`, padded with -1."""
    array = np.full(MAX_STOP_TOKEN_IDS, -1, "int32")
    array[: len(stop_token_ids)] = stop_token_ids
    return array


def is_stop_token(ids: Any, stop_token_ids: Any) -> Any:
    """Returns True for each of `ids [B]` that is a stop token: bool `[B]`, in a program.

    `stop_token_ids` is a `stop_array`, or int32 `[B, MAX_STOP_TOKEN_IDS]` with one for each row.
    """
    return ops.any(ids[:, None] == stop_token_ids, axis=-1)


def ends_with_stop_token(ids: Sequence[int] | np.ndarray, stop_token_ids: Sequence[int]) -> bool:
    """Returns True if the last of `ids` is a stop token. Decoding ends there."""
    return len(ids) > 0 and int(ids[-1]) in stop_token_ids
