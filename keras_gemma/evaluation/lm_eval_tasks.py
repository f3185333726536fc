"""Tasks as objects of lm-evaluation-harness: its prompts, on local data or Hugging Face's.

Reads the YAML file of a task from its folder. lm-eval's own `TaskManager` reads all 13,000 files
first, which takes 24 to 52 seconds.
"""

import ast
import contextlib
import hashlib
import importlib.util
import json
import logging
import lzma
from collections.abc import Callable, Iterator, Sequence
from gzip import open as open_gzip
from pathlib import Path
from typing import Any

import datasets
from jinja2 import UndefinedError
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import GroupConfig
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks._yaml_loader import load_yaml

from keras_gemma.evaluation import winobias
from keras_gemma.evaluation.tasks import HIGHER_IS_BETTER, BenchmarkTask

FOLDER = Path(lm_eval_tasks.__file__).parent
"""Folder of lm-eval's YAML files."""

READERS: dict[str, Callable[..., Any]] = {
    ".jsonl.xz": lzma.open,
    ".jsonl.gz": open_gzip,
    ".jsonl": open,
}
"""Endings of local files, and the functions that open them."""


RunPrograms = Callable[[Sequence[Any], Sequence[str]], list[bool]]
"""Function of documents and completions."""


class MissingData(FileNotFoundError):
    """Data of a task that are neither in the local folder nor on Hugging Face."""


class LocalData:
    """Folder with one folder of JSON Lines per task: `DIR/<task>/<split>.jsonl.xz`.

    Args:
        folder: The folder. `None` if tasks read Hugging Face's data sets.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._rows: dict[Path, list[dict[str, Any]]] = {}

    def path(self, task: BenchmarkTask) -> Path:
        """Returns the folder of a task."""
        return self.folder / (task.folder or task.name)

    def find(self, task: BenchmarkTask, split: str) -> Path | None:
        """Returns the file of a split, or `None` if it does not exist."""
        for ending in READERS:
            matches = sorted(
                self.path(task).glob(task.files[split] + ending), key=lambda p: len(p.name)
            )
            if matches:
                return matches[0]
        return None

    def paths(self, task: BenchmarkTask) -> dict[str, Path]:
        """Returns the files of a task that exist, by split."""
        if self.folder is None:
            return {}
        paths = {split: self.find(task, split) for split in task.files}
        return {split: path for split, path in paths.items() if path is not None}

    def members(self, task: BenchmarkTask) -> list[str]:
        """Returns the members of a group that have items here."""
        path = self.find(task, "test") if self.folder is not None and task.is_group else None
        if path is None:
            return []
        values = {row[task.column] for row in self._rows_of(path)}
        return [member for member in task.members if member in values]

    def read(self, path: Path, member: tuple[str, str] | None = None) -> datasets.Dataset:
        """Returns the rows of a file; with `member`, a column and a value, only those with it."""
        rows = self._rows_of(path)
        if member is not None:
            column, value = member
            rows = [row for row in rows if row[column] == value]
        if not rows:
            raise MissingData(f"{path} has no items{f' of {member[1]}' if member else ''}.")
        return datasets.Dataset.from_list(rows)

    def _rows_of(self, path: Path) -> list[dict[str, Any]]:
        if path not in self._rows:
            self._rows[path] = self._read(path)
        return self._rows[path]

    def _read(self, path: Path) -> list[dict[str, Any]]:
        ending = next(ending for ending in READERS if path.name.endswith(ending))
        try:
            with READERS[ending](path, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
        except (ValueError, EOFError, OSError, lzma.LZMAError) as error:
            raise ValueError(f"{path} is not a readable file of JSON Lines: {error}") from error
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{path} must have a JSON object per line. Received: {row!r}")
        return rows

    def digests(self, task: BenchmarkTask) -> dict[str, str]:
        """Returns the sha256 of each file of a task, by its path in the folder."""
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.paths(task).values()
        }

    def forget(self) -> None:
        """Frees the rows, when all tasks are built."""
        self._rows.clear()


class PreparedTask(ConfigurableTask):
    """Task of lm-eval whose requests are made once, before the model runs."""

    item_ids: list[int] | None = None
    """Items to evaluate, ascending. `None` selects all."""

    @property
    def eval_docs(self) -> datasets.Dataset:
        # lm-eval processes the whole data set each time that it is asked.
        documents = getattr(self, "task_docs", None)
        return super().eval_docs if documents is None else documents

    def prepare(self, chat_template: Callable[..., str] | None = None) -> list[Instance]:
        """Makes the requests of `item_ids` and returns them."""
        self.set_fewshot_seed(DEFAULT_OTHER_SEED)
        self._instances = []
        has_chat = chat_template is not None
        name, repeats = self.config.task, self.config.repeats
        for i, document in self.doc_iterator(samples=self.item_ids):
            context = self.fewshot_context(
                document,
                num_fewshot=self.config.num_fewshot,
                apply_chat_template=has_chat,
                fewshot_as_multiturn=has_chat,
                chat_template=chat_template,
                gen_prefix=self.doc_to_prefix(document),
            )
            requests = self.construct_requests(
                doc=document,
                ctx=context,
                metadata=(name, i, repeats),
                apply_chat_template=has_chat,
                chat_template=chat_template,
            )
            self._instances += requests if isinstance(requests, list) else [requests]
        return self._instances

    def build_all_requests(self, **_: Any) -> None:
        """Keeps the requests that `prepare` made."""


def build(
    task: BenchmarkTask,
    data: LocalData,
    shots: int,
    run_programs: RunPrograms | None = None,
) -> list[PreparedTask]:
    """Returns the lm-eval tasks of a benchmark: one, or those of a group.

    Args:
        task: The benchmark.
        data: Where its items are.
        shots: Number of few-shot examples.
        run_programs: Returns True for each program that passes the tests of its document.

    Raises:
        MissingData: If items or few-shot examples are missing. The message says where to get them.
        ImportError: If the task needs a package that is missing.
    """
    missing = [name for name in task.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{task.name} needs {', '.join(missing)}. Install with `pip install 'lm-eval[math]'`."
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    members = data.members(task) or task.members or ("",)
    configs = [_config(task, data, shots, member, run_programs) for member in members]
    try:
        return [PreparedTask(config=config) for config in configs]
    except (OSError, ValueError) as error:
        if data.folder is not None:
            raise
        raise MissingData(
            f"{configs[0]['dataset_path']} could not be read from Hugging Face: "
            f"{str(error).splitlines()[0]} Connect to the network, or pass `data`, a folder with "
            f"{task.folder or task.name}/{_example_name(task)}."
        ) from error


@contextlib.contextmanager
def explain_columns(task: BenchmarkTask, data: LocalData) -> Iterator[None]:
    """Raises a ValueError with the file and the column if one is missing in this block."""
    try:
        yield
    except (KeyError, UndefinedError) as error:
        paths = data.paths(task).values()
        raise ValueError(
            f"{' or '.join(map(str, paths)) or task.name} lacks a column: {error}. The columns "
            "must be those of the data set on Hugging Face."
        ) from error


def fingerprints(tasks: Sequence[PreparedTask]) -> dict[str, str]:
    """Returns the fingerprint of each data set of Hugging Face that tasks read, by its name."""
    return {
        "/".join(filter(None, (one.config.dataset_path, one.config.dataset_name))): (
            one.eval_docs._fingerprint
        )
        for one in tasks
        if one.config.dataset_path is not None
    }


def group(task: BenchmarkTask, members: Sequence[PreparedTask]) -> Group:
    """Returns a group whose score is the mean over the items of its members."""
    metric = {"metric": task.metric, "aggregation": "mean", "weight_by_size": True}
    config = GroupConfig(
        group=task.name, aggregate_metric_list=[metric | {"filter_list": [task.filter]}]
    )
    task_group = Group.from_config(config)
    for member in members:
        task_group.add(member)
    return task_group


def _config(
    task: BenchmarkTask,
    data: LocalData,
    shots: int,
    member: str,
    run_programs: RunPrograms | None,
) -> dict[str, Any]:
    """Returns the content of a task's YAML file with shots and data set."""
    if task.yaml is None:
        config = dict(winobias.CONFIG)
    else:
        path = FOLDER / task.yaml.format(member=member)
        # The functions of tasks that run programs download lm-eval's way to run them.
        config = dict(load_yaml(path, resolve_func=not task.runs_programs))
    for key in ("tag", "group"):
        config.pop(key, None)
    config |= task.changes
    config["num_fewshot"] = task.shots if task.has_fixed_shots else shots
    if task.runs_programs:
        config = _with_programs(config, run_programs)
    if data.folder is not None:
        _use_local_data(config, task, data, shots, member)
    elif "dataset_path" not in config:
        raise MissingData(
            f"{task.name} is not on Hugging Face in a form that lm-eval reads. Pass `data`, a "
            f"folder with {task.name}/{_example_name(task)}."
        )
    return config


def _with_programs(config: dict[str, Any], run_programs: RunPrograms) -> dict[str, Any]:
    """Returns a config whose items are scored by `run_programs`, all at once."""

    def verdicts(answers: Sequence[Sequence[str]], documents: Sequence[Any]) -> list[list[bool]]:
        passed = run_programs(documents, [answer[0] for answer in answers])
        return [[verdict] for verdict in passed]

    config = config | {
        "filter_list": [
            {"name": "none", "filter": [{"function": "custom", "filter_fn": verdicts}]}
        ],
        "process_results": lambda _, verdicts: {"pass@1": float(verdicts[0][0])},
        "metric_list": [{"metric": "pass@1", **HIGHER_IS_BETTER}],
    }
    examples = config.get("fewshot_config", {})
    if isinstance(examples.get("samples"), str):
        config["fewshot_config"] = examples | {"samples": _read_examples(examples["samples"])}
    return config


def _read_examples(function: str) -> list[dict[str, Any]]:
    """Returns the list that a function in a file returns, without importing the file."""
    path, _, name = function.rpartition(".")
    tree = ast.parse(Path(f"{path}.py").read_text(encoding="utf-8"))
    definition = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return ast.literal_eval(next(n for n in definition.body if isinstance(n, ast.Return)).value)


def _use_local_data(
    config: dict[str, Any], task: BenchmarkTask, data: LocalData, shots: int, member: str
) -> None:
    """Replaces the data set of `config` by local files."""
    evaluated = config.get("test_split") or config.get("validation_split")
    paths = data.paths(task)
    if evaluated not in paths:
        raise MissingData(
            f"{data.path(task)} has no file {_example_name(task)}. Put one there: one JSON "
            f"object per line, with the columns of {config.get('dataset_path', 'WinoBias')} on "
            "Hugging Face. Or leave out `data`, to download that data set."
        )
    examples = config.get("fewshot_split") or config.get("training_split")
    config |= task.local_changes
    selected = (task.column, member) if task.column else None
    splits = {split: data.read(path, selected) for split, path in paths.items()}
    if shots and not task.has_fixed_shots:
        # lm-eval draws one more, in case that the item is among them.
        needed = shots + ("first_n" not in str(config.get("fewshot_config")))
        if len(splits.get(examples, ())) < needed:
            raise MissingData(
                f"{data.path(task)} has too few examples for {shots} shots. Put {needed} or more "
                f"into {examples}.jsonl there, or pass `shots=0`."
            )
    for key in ("fewshot_split", "training_split", "validation_split", "test_split"):
        if config.get(key) not in splits:
            config[key] = None
    for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    config["custom_dataset"] = lambda **_: splits


def _example_name(task: BenchmarkTask) -> str:
    """Returns the name of the file with a task's items."""
    return f"{next(iter(task.files.values())).rstrip('*') or 'prompts'}.jsonl"
