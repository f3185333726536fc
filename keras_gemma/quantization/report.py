"""Report on a quantized model: bytes before and after, errors, and weights that were not quantized.

Reads `backbone.named_weights()`. Knows nothing about layers.
"""

import dataclasses
import io
from typing import Any

NORM = "norm weights are small and sensitive"
PLAIN = "the model is not quantized"
FLOATS = "stored in floating point"


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """Size and quantization error of one weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """`"int8"`, `"int4"`, or a floating-point dtype."""
    bytes_before: int
    """Bytes in the dtype of the model's unquantized weights."""
    bytes_after: int
    """Bytes including scales and zero points."""
    relative_error: float | None
    """Norm of the difference over the norm of the weight. 0 if the weight is not quantized, `None`
    if the original weight is unknown."""
    kept: str | None
    """Reason why the weight is not quantized; `None` if it is quantized."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Sizes and quantization errors of all weights of a model. `str(report)` is a table."""

    quantization: str
    """Description of the quantization."""
    weights: tuple[WeightReport, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights in the dtype of the model's unquantized weights."""
        return sum(weight.bytes_before for weight in self.weights)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights including scales and zero points."""
        return sum(weight.bytes_after for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Returns weights and totals as JSON-compatible values."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {**dataclasses.asdict(self), **totals}

    def summary(self) -> str:
        """Returns a line with the settings, the sizes, and the largest error of a weight."""
        before, after = self.bytes_before, self.bytes_after
        line = (
            f"{self.quantization}; {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after: "
            f"{after / before:.1%}"
        )
        errors = [w for w in self.weights if w.relative_error and w.kept is None]
        if errors:
            worst = max(errors, key=lambda weight: weight.relative_error)
            line += f"; error at most {worst.relative_error:.2%} ({worst.name})"
        return line

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("weight", "shape", "dtype", "MB before", "MB after", "error", "note"):
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
                "unknown" if error is None else f"{error:.2%}",
                weight.kept or "",
            )
        out = io.StringIO()
        Console(file=out, width=200, color_system=None).print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        return "\n".join([self.summary(), *lines])


def report(model: Any) -> Report:
    """Returns the size and quantization error of each weight of a model.

    Args:
        model: A `GemmaCausalLM` or a `GemmaBackbone`.

    Returns:
        A `Report`. Printing it shows a table.

    Raises:
        TypeError: If `model` has another type.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en", quantization="int4")
    report = keras_gemma.quantization.report(lm)
    report.bytes_after / report.bytes_before, report.weights[0].relative_error
    ```
    """
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "named_weights"):
        raise TypeError(
            f"`model` must be a GemmaCausalLM or a GemmaBackbone. Received: model={model!r:.100}"
        )
    config, weights = backbone.quantization, []
    for name, weight in backbone.named_weights().items():
        quantized = weight.dtype in ("int8", "int4")
        kept = None if quantized else NORM if weight.kind == "norm" else FLOATS if config else PLAIN
        sizes, error = (weight.plain_bytes, weight.bytes), weight.relative_error
        weights.append(WeightReport(name, weight.shape, weight.dtype, *sizes, error, kept))
    return Report(config.describe() if config else "not quantized", tuple(weights))
