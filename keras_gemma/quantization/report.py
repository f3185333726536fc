"""What quantization did to a model: bytes before and after, errors, and what it left alone.

Knows a model by `backbone.named_weights()`, and no layer.
"""

import dataclasses
import io
from typing import Any

NORM = "a norm: small, and everything is multiplied by it"
PLAIN = "the model is not quantized"


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """One weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """`"int8"`, `"int4"`, or the floating-point dtype that it has."""
    bytes_before: int
    """In the dtype that the model keeps its other weights in."""
    bytes_after: int
    relative_error: float | None
    """The norm of the difference over that of the weight; 0 where nothing was changed, None where
    nobody knows what the weight was."""
    kept: str | None
    """Why it is not quantized; None where it is."""


@dataclasses.dataclass(frozen=True)
class Report:
    """All weights of a model; `str(report)` is a table."""

    quantization: str
    """In words."""
    weights: tuple[WeightReport, ...]

    @property
    def bytes_before(self) -> int:
        """Of all weights, in the dtype that the model keeps its other weights in."""
        return sum(weight.bytes_before for weight in self.weights)

    @property
    def bytes_after(self) -> int:
        """Of all weights, with their scales and zero points."""
        return sum(weight.bytes_after for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {**dataclasses.asdict(self), **totals}

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("weight", "shape", "dtype", "MB before", "MB after", "error", "kept"):
            number = column.startswith("MB") or column == "error"
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for weight in self.weights:
            error = weight.relative_error
            table.add_row(
                weight.name,
                " x ".join(map(str, weight.shape)),
                weight.dtype,
                f"{weight.bytes_before / 1e6:.3f}",
                f"{weight.bytes_after / 1e6:.3f}",
                "not known" if error is None else f"{error:.2%}",
                weight.kept or "",
            )
        out = io.StringIO()
        Console(file=out, width=200, color_system=None).print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        before, after = self.bytes_before, self.bytes_after
        total = f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after: {after / before:.1%}"
        return "\n".join([f"{self.quantization}; {total}", *lines])


def report(model: Any) -> Report:
    """What the weights of a model take, and what quantization cost them.

    Args:
        model: a `GemmaCausalLM` or a `GemmaBackbone`.

    Returns:
        Figures by weight; `print` shows a table.

    Raises:
        TypeError: `model` is something else.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en", quantization="int4")
    found = keras_gemma.quantization.report(lm)
    found.bytes_after / found.bytes_before, found.weights[0].relative_error
    ```
    """
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "named_weights"):
        raise TypeError(
            f"`model` must be a GemmaCausalLM or a GemmaBackbone. Received: model={model!r:.100}"
        )
    weights = []
    for name, weight in backbone.named_weights().items():
        quantized = weight.dtype in ("int8", "int4")
        kept = None if quantized else NORM if weight.kind == "norm" else PLAIN
        weights.append(
            WeightReport(
                name=name,
                shape=weight.shape,
                dtype=weight.dtype,
                bytes_before=weight.plain_bytes,
                bytes_after=weight.bytes,
                relative_error=weight.relative_error if quantized else 0.0,
                kept=kept,
            )
        )
    config = backbone.quantization
    return Report(config.describe() if config else "not quantized", tuple(weights))
