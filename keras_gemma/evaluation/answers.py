"""Answers of a model in a file, so that an interrupted run resumes.

`ResumableLM` wraps a model of lm-eval: it looks an answer up, and asks the model only for those
that are missing. The model stores answers after each batch, by lm-eval's `cache_hook`, so that a
killed run loses at most a batch.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, hash_args

TRUNCATED = "truncated"
"""Method whose answer is True for requests that are longer than the context."""


class AnswerFile:
    """Answers by the hash of method and arguments, in SQLite.

    Args:
        path: The file. `None` keeps the answers in memory.

    Raises:
        ValueError: If the file is damaged.
        OSError: If the file cannot be used, such as one without permission or on a full disk.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        with self._explained():
            self.connection = sqlite3.connect(path or ":memory:", isolation_level=None)
            # A crash of the machine may damage the file; the end of this process cannot.
            self.connection.execute("PRAGMA synchronous=OFF")
            self.connection.execute("PRAGMA journal_mode=WAL")
            state = self.connection.execute("PRAGMA quick_check").fetchone()[0]
            if state != "ok":
                raise sqlite3.DatabaseError(state)
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises errors of SQLite in this block as errors that say what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(
                f"{self.path} cannot be used: {error}. Another process may use it, its folder may "
                "be read-only, or its disk full."
            ) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} is damaged: {error}. Delete it, and its answers are computed again."
            ) from error

    def find(self, request: str) -> Any:
        """Returns the answer of a request, or `None`."""
        with self._explained():
            rows = self.connection.execute("SELECT answer FROM answers WHERE request=?", [request])
            row = rows.fetchone()
        return None if row is None else json.loads(row[0])

    def add(self, request: str, answer: Any) -> None:
        with self._explained():
            self.connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)", [request, json.dumps(answer)]
            )

    def close(self) -> None:
        """Closes the file, and deletes it if it has no answers."""
        is_empty = self.connection.execute("SELECT 1 FROM answers").fetchone() is None
        self.connection.close()
        if is_empty and self.path is not None:
            self.path.unlink(missing_ok=True)


class ResumableLM(LM):
    """Model that is asked only for answers that are not in a file.

    Args:
        model: An LM of lm-eval.
        answers: The file.
        answered: Called with the number of answers that the model gave, after each batch.
    """

    def __init__(
        self, model: LM, answers: AnswerFile, answered: Callable[[int], None] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.answers = answers
        self.answered = answered
        model.set_cache_hook(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_partial(self, method: str, arguments: Iterable[Any], answer: Any) -> None:
        """Stores an answer. The model calls it after each batch, as lm-eval's `cache_hook`."""
        if not _is_sampled(method, arguments):
            self.answers.add(hash_args(method, arguments), answer)
        if self.answered is not None:
            self.answered(1)

    def missing(self, requests: Sequence[Instance]) -> list[Instance]:
        """Returns the requests without an answer."""
        return [request for request in requests if self._find(request) is None]

    def find_truncated(self, requests: Sequence[Instance]) -> set[tuple[str, int]]:
        """Returns task and document of requests that are longer than the context.

        The model knows those that it has counted. They are stored, because a later process counts
        only those without an answer.
        """
        counted = set(getattr(self.model, "truncated", ()))
        for request in requests:
            if (request.task_name, request.doc_id) in counted:
                self.answers.add(hash_args(TRUNCATED, request.args), True)
        return {
            (request.task_name, request.doc_id)
            for request in requests
            if self.answers.find(hash_args(TRUNCATED, request.args))
        }

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [tuple(answer) for answer in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answer("generate_until", requests)

    def apply_chat_template(self, *arguments: Any, **options: Any) -> str:
        return self.model.apply_chat_template(*arguments, **options)

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer_name

    def _find(self, request: Instance) -> Any:
        if _is_sampled(request.request_type, request.args):
            return None
        return self.answers.find(hash_args(request.request_type, request.args))

    def _answer(self, method: str, requests: list[Instance]) -> list[Any]:
        """Returns the answers of requests, in their order."""
        answers = [self._find(request) for request in requests]
        places = [i for i, answer in enumerate(answers) if answer is None]
        if places:
            new = getattr(self.model, method)([requests[i] for i in places])
            for i, answer in zip(places, new, strict=True):
                answers[i] = answer
                if not _is_sampled(method, requests[i].args):
                    self.answers.add(hash_args(method, requests[i].args), answer)
        return answers


def _is_sampled(method: str, arguments: Iterable[Any]) -> bool:
    """Returns True if the model draws a new answer each time."""
    return method == "generate_until" and bool(tuple(arguments)[1].get("do_sample", False))
