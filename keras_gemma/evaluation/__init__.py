"""Benchmarks of the model cards, on lm-evaluation-harness.

Names load when they are used, because lm-eval takes seconds to import and may be missing.

    tasks.py            the cards' tasks as data: prompts, shots, metrics, published scores
    winobias.py         WinoBias, which lm-eval lacks
    lm_eval_tasks.py    tasks as lm-eval's objects, on local data or Hugging Face's
    harness.py          KerasGemmaLM, a model of lm-eval
    answers.py          answers of a model in a file, so that a run resumes
    results.py          scores with errors: tables, a plot, files
    run.py              the function `evaluate`
    callback.py         evaluation while a model is trained
    __main__.py         lm-eval's own command line
    programs.py         programs made by a model, run apart: HumanEval, MBPP, pass@k
    program_child.py    the child processes of `programs.py`
    fences.py           what keeps a program away from the system
    safety.py           generated texts in a file, and their scores by a judge
    estimates.py        means with standard errors, and paired differences
    leaderboard.py      evaluated models next to each other
"""

import importlib
from typing import Any

from keras_gemma.extras import check_evaluation

_FILES = {
    "BenchmarkTask": "tasks",
    "TASKS": "tasks",
    "CARDS": "tasks",
    "EvaluateCallback": "callback",
    "KerasGemmaLM": "harness",
    "Results": "results",
    "TaskResult": "results",
    "compare": "leaderboard",
    "evaluate": "run",
}
"""File of each public name."""

__all__ = [
    "CARDS",
    "TASKS",
    "BenchmarkTask",
    "EvaluateCallback",
    "KerasGemmaLM",
    "Results",
    "TaskResult",
    "compare",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    """Returns a public name, from the file that defines it."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("evaluate", "KerasGemmaLM"):
        check_evaluation()
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
