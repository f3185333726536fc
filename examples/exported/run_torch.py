"""Greedy text from an export to PyTorch, with only torch, numpy and sentencepiece.

lm.export("my_export", format="torch")
python examples/exported/run_torch.py my_export "ROMEO:" "JULIET:" --max-new-tokens 40
"""

from pathlib import Path
from typing import Any

import torch
from greedy import main


def load(folder: Path, about: dict[str, Any]) -> Any:
    """The program as `greedy.complete` calls it."""
    program = torch.export.load(folder / about["program"]).module()
    device = about["device"]

    def read(token_ids: Any, start: Any, last: Any, cache: Any) -> Any:
        tensors = (torch.from_numpy(array).to(device) for array in (token_ids, start, last))
        with torch.inference_mode():
            logits, cache = program(*tensors, cache)
        return logits.cpu().numpy(), cache

    def zeros(shape: tuple[int, ...], dtype: str) -> Any:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)

    return read, zeros


if __name__ == "__main__":
    main(load)
