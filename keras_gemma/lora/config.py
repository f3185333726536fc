"""What an adapter consists of: which matrices, of what rank and scale. Settings, checked.

Knows the names of a model's matrices and no weights.
"""

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Iterable
from typing import Any

from keras_gemma.config import GemmaConfig
from keras_gemma.lora.low_rank import scale_of

MATRICES = {
    "query": ("q_proj", "query_dense"),
    "key": ("k_proj", "key_dense"),
    "value": ("v_proj", "value_dense"),
    "output": ("o_proj", "output_dense", "attention_output"),
    "gate": ("gate_proj", "ffw_gating", "gating_ffw"),
    "up": ("up_proj", "ffw_gating_2", "gating_ffw_2"),
    "down": ("down_proj", "ffw_linear"),
}
"""The matrices of a block, and what peft and KerasHub call them."""

EMBEDDINGS = ("token_embedding", "embed_tokens", "lm_head", "embedding")
ALL_LINEAR = "all-linear"
DTYPES = ("float32", "bfloat16", "float16", "float64")

_KINDS = {other: kind for kind, others in MATRICES.items() for other in (kind, *others)}


@dataclasses.dataclass(frozen=True)
class Lora:
    """An adapter's settings: what `.keras` files keep of it beside its variables."""

    sizes: dict[str, tuple[int, float]]
    """Rank and alpha of each adapted matrix, by its name in `GemmaConfig.weight_shapes`."""
    dropout: float = 0.0
    """The share of a matrix's input that its product of low rank does not see in training."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(rank)` instead of `alpha / rank`."""
    dtype: str = "float32"
    """Of the variables."""

    def scale(self, name: str) -> float:
        """The factor of the product of low rank beside a matrix."""
        return scale_of(*self.sizes[name], self.use_rslora)

    def describe(self) -> str:
        """In a few words."""
        ranks = sorted({rank for rank, _ in self.sizes.values()})
        return f"rank {', '.join(map(str, ranks))} on {len(self.sizes)} matrices"

    def describe_all(self) -> str:
        """In more words: two adapters of which they are the same are trained alike."""
        kinds = ", ".join(sorted({name.split(".")[-1] for name in self.sizes}))
        alphas = ", ".join(f"{a:g}" for a in sorted({alpha for _, alpha in self.sizes.values()}))
        scaled = f"alpha {alphas}{', rsLoRA' if self.use_rslora else ''}"
        return f"{self.describe()} ({kinds}), {scaled}, dropout {self.dropout:g}, {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        sizes = {name: list(size) for name, size in self.sizes.items()}
        return {**dataclasses.asdict(self), "sizes": sizes}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Lora":
        """The way back."""
        sizes = {name: tuple(size) for name, size in values["sizes"].items()}
        return cls(**{**values, "sizes": sizes})


def read_lora(
    config: GemmaConfig,
    rank: int,
    alpha: float,
    targets: str | Iterable[str],
    dropout: float,
    use_rslora: bool,
    dtype: str,
) -> Lora:
    """The settings of `enable_lora`, checked.

    Raises:
        ValueError: one that is out of range, or a target that no model has.
    """
    check_numbers(rank, alpha, dropout)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}. Received: dtype={dtype!r}")
    names = target_names(config, targets)
    return Lora(dict.fromkeys(names, (rank, float(alpha))), float(dropout), bool(use_rslora), dtype)


def check_numbers(rank: Any, alpha: Any, dropout: Any) -> None:
    """Raise a ValueError where an adapter's number is out of range."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            "`rank` must be a whole number from 1 on: the rows of A and the columns of B. 8 is a "
            f"good start. Received: rank={rank!r}"
        )
    if not _is_number(alpha) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            "`alpha` must be a number above 0: the adapter counts alpha / rank, and with 0 it "
            f"would do nothing. Received: alpha={alpha!r}"
        )
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(
            "`dropout` must be a share from 0 on and below 1, such as 0.05. "
            f"Received: dropout={dropout!r}"
        )


def target_names(config: GemmaConfig, targets: str | Iterable[str]) -> list[str]:
    """The adapted matrices in the order of the data, from what a user calls them.

    Args:
        targets: `"all-linear"`; or kinds of matrices, as `"query"` or peft's `"q_proj"`; or
            patterns of names, as `"layers.[0-3].*"`.

    Raises:
        ValueError: no targets, an unknown one, or the embedding.
    """
    matrices = [name for name in config.weight_shapes() if name.split(".")[-1] in MATRICES]
    if isinstance(targets, str):
        targets = [targets]
    targets = list(targets)
    if not targets:
        raise ValueError(
            "`targets` must name a matrix at least, as ('query', 'value'), or be 'all-linear'. "
            f"Received: targets={targets!r}"
        )
    chosen: set[str] = set()
    for target in targets:
        found = matrices if target == ALL_LINEAR else _match(matrices, target)
        if not found:
            raise ValueError(_unknown(target))
        chosen.update(found)
    return [name for name in matrices if name in chosen]


def _match(matrices: list[str], target: Any) -> list[str]:
    if not isinstance(target, str):
        return []
    if target in _KINDS:
        return [name for name in matrices if name.split(".")[-1] == _KINDS[target]]
    return [
        name
        for name in matrices
        if fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name.split(".")[-1], target)
    ]


def _unknown(target: Any) -> str:
    if target in EMBEDDINGS:
        return (
            "The embedding is also the head's matrix, so an adapter of one would be half of one: "
            "it cannot be adapted. Choose matrices of the blocks, or targets='all-linear'. "
            f"Received: {target!r} in `targets`"
        )
    near = difflib.get_close_matches(str(target), list(_KINDS), 3)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return (
        f"`targets` names what no block has. {hint}The matrices are {', '.join(MATRICES)}; peft's "
        "names such as 'q_proj', patterns such as 'layers.[0-3].*' and 'all-linear' serve too. "
        f"Received: {target!r}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
