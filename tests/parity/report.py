"""Prints the differences from transformers for every variant: `python -m tests.parity.report`.

KERAS_BACKEND selects the backend. Differences are relative to the largest value, and for bfloat16
to the root mean square.
"""

from keras_gemma.backend_choice import use_backend
from tests.configurations import CONFIGURATIONS
from tests.parity.pairs import (
    FULL,
    PADDED,
    largest_difference,
    make_ours,
    make_theirs,
    run_ours,
    run_theirs,
    typical_difference,
)


def main() -> None:
    print(f"| {use_backend()} | hidden | logits | padded logits | bfloat16 logits |")
    print("|---|---|---|---|---|")
    for variant, configuration in CONFIGURATIONS.items():
        ours, theirs = make_ours(configuration), make_theirs(configuration)
        numbers = []
        for mask, names in ((FULL, ("hidden", "logits")), (PADDED, ("logits",))):
            a, b = run_ours(ours, mask), run_theirs(theirs, mask)
            numbers += [largest_difference(a[name], b[name], mask) for name in names]
        a = run_ours(make_ours(configuration, "bfloat16"), FULL)["logits"]
        b = run_theirs(theirs.bfloat16(), FULL)["logits"]
        numbers.append(typical_difference(a, b))
        print(f"| {variant} | " + " | ".join(f"{number:.1e}" for number in numbers) + " |")


if __name__ == "__main__":
    main()
