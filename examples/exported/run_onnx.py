"""Greedy text from an export to ONNX, with only onnxruntime, numpy and sentencepiece.

lm.export("my_export", format="onnx")
python examples/exported/run_onnx.py my_export "ROMEO:" "JULIET:" --max-new-tokens 40
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from greedy import main


def load(folder: Path, about: dict[str, Any]) -> Any:
    """The program as `greedy.complete` calls it."""
    session = onnxruntime.InferenceSession(folder / about["program"])
    names = [entry.name for entry in session.get_inputs()]

    def read(token_ids: Any, start: Any, last: Any, cache: Any) -> Any:
        arrays = zip(names, (token_ids, start, last, *cache), strict=True)
        logits, *cache = session.run(None, dict(arrays))
        return logits, cache

    return read, np.zeros


if __name__ == "__main__":
    main(load)
