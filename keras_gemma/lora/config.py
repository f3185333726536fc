"""Settings of a LoRA adapter and their validation.

Knows the names of a model's matrices. Knows nothing about weights.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from keras_gemma.checks import check_integer, check_number, check_one_of
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
"""Matrices of a block, each with its names in PEFT and KerasHub."""

DEFAULT_TARGETS = ("query", "value")
"""Matrices that are adapted by default, as in KerasHub."""

EMBEDDINGS = ("token_embedding", "embed_tokens", "lm_head", "embedding")
ALL_LINEAR = "all-linear"
DTYPES = ("float32", "bfloat16", "float16", "float64")

_KINDS = {other: kind for kind, others in MATRICES.items() for other in (kind, *others)}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of an adapter, as stored in `.keras` files."""

    sizes: dict[str, tuple[int, float]]
    """Rank and alpha of each adapted matrix, by its name in `GemmaConfig.weight_shapes`."""
    dropout: float = 0.0
    """Dropout rate of the adapter's input in training."""
    use_rslora: bool = False
    """If True, the scale is `alpha / sqrt(rank)` instead of `alpha / rank`."""
    dtype: str = "float32"
    """Dtype of A and B."""

    def scale(self, name: str) -> float:
        """Returns the scale of the update of the matrix `name`."""
        return scale_of(*self.sizes[name], self.use_rslora)

    def describe(self) -> str:
        """Returns a short description, such as "rank 4 on 28 matrices"."""
        ranks = sorted({rank for rank, _ in self.sizes.values()})
        return f"rank {', '.join(map(str, ranks))} on {len(self.sizes)} matrices"

    def describe_all(self) -> str:
        """Returns a full description. Equal descriptions mean identical training setups."""
        kinds = ", ".join(sorted({name.split(".")[-1] for name in self.sizes}))
        alphas = ", ".join(f"{a:g}" for a in sorted({alpha for _, alpha in self.sizes.values()}))
        scaled = f"alpha {alphas}{', rsLoRA' if self.use_rslora else ''}"
        return f"{self.describe()} ({kinds}), {scaled}, dropout {self.dropout:g}, {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON-compatible values."""
        sizes = {name: list(size) for name, size in self.sizes.items()}
        return {**dataclasses.asdict(self), "sizes": sizes}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Lora":
        """Inverse of `to_dict`."""
        sizes = {name: tuple(size) for name, size in values["sizes"].items()}
        return cls(**{**values, "sizes": sizes})


def read_lora(
    config: GemmaConfig,
    rank: int,
    targets: str | Iterable[str] | None,
    alpha: float,
    dropout: float,
    use_rslora: bool,
    dtype: str,
) -> Lora:
    """Returns the validated settings of an `enable_lora` call."""
    check_lora_numbers(rank, alpha, dropout)
    check_one_of("dtype", dtype, DTYPES)
    names = target_names(config, DEFAULT_TARGETS if targets is None else targets)
    size = int(rank), float(alpha)
    return Lora(dict.fromkeys(names, size), float(dropout), bool(use_rslora), dtype)


def check_lora_numbers(rank: Any, alpha: Any, dropout: Any) -> None:
    check_integer("rank", rank, advice="It is the number of rows of A, such as 8.")
    check_number("alpha", alpha, "(0, inf)", "The adapter is scaled by alpha / rank.")
    check_number("dropout", dropout, "[0, 1)", "A usual value is 0.05.")


def target_names(config: GemmaConfig, targets: str | Iterable[str]) -> list[str]:
    """Returns the names of the matrices that `targets` selects, in the order of `weight_shapes`."""
    matrices = [name for name in config.weight_shapes() if name.split(".")[-1] in MATRICES]
    if isinstance(targets, str):
        targets = [targets]
    targets = list(targets) if isinstance(targets, Iterable) else targets
    if not isinstance(targets, list) or not targets:
        raise ValueError(
            "`targets` must be names of matrices, such as ('query', 'value'), or 'all-linear'. "
            f"`alpha` sets the scale. Received: targets={targets!r}"
        )
    chosen: set[str] = set()
    for target in targets:
        matches = matrices if target == ALL_LINEAR else _match(matrices, target)
        if not matches:
            raise ValueError(_unknown(target))
        chosen.update(matches)
    return [name for name in matrices if name in chosen]


def _match(matrices: list[str], target: Any) -> list[str]:
    if not isinstance(target, str):
        return []
    pattern = _KINDS.get(target, target)
    return [
        n for n in matrices if any(fnmatchcase(part, pattern) for part in (n, n.split(".")[-1]))
    ]


def _unknown(target: Any) -> str:
    if target in EMBEDDINGS:
        return (
            "The embedding cannot be adapted, because the output head shares its matrix. Choose "
            f"matrices of the blocks, or targets='all-linear'. Received: {target!r} in `targets`"
        )
    near = difflib.get_close_matches(str(target), list(_KINDS), 3)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return (
        f"A target matches no matrix. {hint}The matrices are {', '.join(MATRICES)}. `targets` also "
        "accepts PEFT's names such as 'q_proj', patterns such as 'layers.[0-3].*', and "
        f"'all-linear'. Received: {target!r}"
    )
