"""Countable rules of the project's English; `python tests/test_prose.py` prints counts per file.

Checks docstrings and attribute docstrings of the package, string messages of `raise`, the README
and the pages in `docs/`. Needs neither Keras nor a framework.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""Allowed matches: file and rule to the reason."""

FIRST_WORD = re.compile(r"(What|Whether|Who|How|Which|Where|Of|Those)\b")
"""First words that a docstring must not have."""

RULES = {
    "alone": r"\balone\b",
    "likeliest": r"\blikeliest\b",
    "anew": r"\banew\b",
    "stands": r"\bstands?\b",
    "none as a predicate": r"\bNone: none\b|\bNone for none\b|\bis none\b",
    "negated noun": r"\bis no (?!longer\b|more\b|less\b|greater\b|smaller\b|larger\b)[A-Za-z`]",
    "as of": r"\bas of `",
    "own": r"\b(?:of one's own|a user's own|users' own)\b",
    "beside": r"\bbeside\b",
    "where for if": (
        r"\b[Ww]here (?:it|they|there|one|both|nothing|no|a|an) (?:is|are|has|have|does|do)\b"
    ),
    "lies": r"\blies\b",
    "goes on": r"\bgo(?:es)? on\b",
    "British spelling": (
        r"\b\w*(?:quantis|normalis|initialis|serialis|optimis|tokenis|penalis|materialis|"
        r"generalis|recognis|organis)(?:e|ed|es|er|ers|ing|ation)\b"
        r"|\b(?:licence|colour|favour|behaviour|neighbour|centre)\w*"
    ),
}
"""Rule to the regular expression that finds its violations."""
COMPILED = {rule: re.compile(pattern) for rule, pattern in RULES.items()}

CODE_BLOCK = re.compile(r"```.*?```", re.DOTALL)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields line and text of all docstrings, including those after an assignment."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        has_docstring = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for i, statement in enumerate(body):
            follows = i > 0 and isinstance(body[i - 1], ast.Assign | ast.AnnAssign)
            first = i == 0 and isinstance(node, has_docstring)
            if (
                (first or follows)
                and isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                yield statement.lineno, statement.value.value


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields line and text of each string that is part of a `raise` statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            parts = [
                part.value
                for part in ast.walk(node.exc)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            yield node.lineno, " ".join(parts)


def matches(text: str, is_docstring: bool = False) -> list[tuple[str, str]]:
    """Returns rule and matched words of each violation in a text."""
    text = " ".join(CODE_BLOCK.sub("", text).split())
    violations = []
    if is_docstring and (word := FIRST_WORD.match(text)):
        violations.append(("first word", word.group()))
    for rule, pattern in COMPILED.items():
        violations += [(rule, match.group()) for match in pattern.finditer(text)]
    return violations


def violations_by_file() -> dict[str, list[tuple[int, list[tuple[str, str]]]]]:
    """Returns line and violations of each text with any, by file."""
    texts = []
    for path in sorted((ROOT / "keras_gemma").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts += [(path, line, text, True) for line, text in docstrings(tree)]
        texts += [(path, line, text, False) for line, text in messages(tree)]
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        paragraphs = CODE_BLOCK.sub(lambda code: "\n" * code.group().count("\n"), path.read_text())
        lines = enumerate(paragraphs.splitlines(), start=1)
        texts += [(path, number, line, False) for number, line in lines]
    report: dict[str, list[tuple[int, list[tuple[str, str]]]]] = {}
    for path, line, text, is_docstring in texts:
        name = path.relative_to(ROOT).as_posix()
        rules = [m for m in matches(text, is_docstring) if (name, m[0]) not in EXCEPTIONS]
        if rules:
            report.setdefault(name, []).append((line, rules))
    return report


def test_prose():
    report = violations_by_file()
    lines = [
        f"{name}:{line}: {', '.join(f'{words!r} ({rule})' for rule, words in rules)}"
        for name, entries in report.items()
        for line, rules in sorted(entries)
    ]
    assert not lines, "\n".join(["", *lines])


def test_exceptions_are_in_use():
    """An exception without a match is outdated."""
    for name, rule in EXCEPTIONS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert rule in {match[0] for match in matches(text)}, f"{name} has no match for {rule}"


def test_rules_match_their_patterns():
    for text, rule in {
        "What is generated.": "first word",
        "Those of the backbone.": "first word",
        "ids that end a row; None: none.": "none as a predicate",
        "The file is no JSON.": "negated noun",
        "A normalised row.": "British spelling",
        "Settings, as of `generate`.": "as of",
        "None where there is no name.": "where for if",
    }.items():
        assert rule in {match[0] for match in matches(text, is_docstring=True)}
    for text in ("Returns True if the prompt is no longer cached.", "Example:\n```\nWhat\n```"):
        assert matches(text, is_docstring=True) == []


if __name__ == "__main__":
    counts = {name: len(entries) for name, entries in violations_by_file().items()}
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:5}  {name}")
    print(f"{sum(counts.values()):5}  total")
