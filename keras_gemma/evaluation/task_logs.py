"""Results and logs of a task in lm-eval's own format."""

import datetime
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.utils import handle_non_serializable, sanitize_list

from keras_gemma.evaluation.results import write_file

_JSON: dict[str, Any] = {"default": handle_non_serializable, "ensure_ascii": False}
"""Arguments of `json.dumps` in lm-eval."""


def write_logs(folder: Path, content: dict[str, Any], model: dict[str, Any]) -> None:
    """Writes lm-eval's results and its log of each item, under the names that lm-eval gives."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now()
    date = now.isoformat().replace(":", "-")
    earlier = [*folder.glob("results_*.json"), *folder.glob("samples_*.jsonl")]
    logs = content.pop("samples")
    for name, items in logs.items():
        lines = [json.dumps(_log_entry(item), **_JSON) + "\n" for item in items]
        write_file(folder / f"samples_{name}_{date}.jsonl", "".join(lines))
    content["config"] = {
        "model": "keras_gemma",
        "model_args": model,
        "fewshot_seed": DEFAULT_OTHER_SEED,
    }
    content |= {
        "date": now.timestamp(),
        "lm_eval_version": version("lm_eval"),
        "model_source": "keras_gemma",
        "model_name": model["name"],
    }
    write_file(folder / f"results_{date}.json", json.dumps(content, indent=2, **_JSON))
    for path in earlier:
        path.unlink()


def _log_entry(item: dict[str, Any]) -> dict[str, Any]:
    """Returns an item in the form of lm-eval's log."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(values)}
        for i, values in enumerate(item["arguments"])
    }
    return item | {
        "resps": sanitize_list(item["resps"]),
        "filtered_resps": sanitize_list(item["filtered_resps"]),
        "arguments": arguments,
        "target": str(item["target"]),
    }
