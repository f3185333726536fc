"""Countable rules of the project's English; `python tests/test_prose.py` prints counts per file.

Checks docstrings, strings with a space and comments of the code, notebooks, and text files. Needs
neither Keras nor a framework.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

EXCEPTIONS: dict[str, str] = {"tests/test_prose.py": "names the words that it looks for"}
"""Files that are not checked, with the reason."""

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


def docstrings(tree: ast.Module) -> dict[ast.Constant, str]:
    """Returns all docstrings by node, including those after an assignment."""
    nodes = []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        has_docstring = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for i, statement in enumerate(body):
            follows = i > 0 and isinstance(body[i - 1], ast.Assign | ast.AnnAssign)
            first = i == 0 and isinstance(node, has_docstring)
            if (first or follows) and isinstance(statement, ast.Expr):
                nodes.append(statement.value)
    return {node: node.value for node in nodes if is_string(node)}


def is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def strings(tree: ast.Module) -> dict[ast.AST, str]:
    """Returns all strings that contain a space by node; an f-string has X for each value."""
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {part for node in joined for part in ast.walk(node) if part is not node}
    texts = {
        node: "".join(part.value if is_string(part) else "X" for part in node.values)
        for node in joined
    }
    texts |= {node: node.value for node in ast.walk(tree) if is_string(node) and node not in parts}
    return {node: text for node, text in texts.items() if " " in text}


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yields first line and text of each comment, which may have several lines."""
    lines: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, is_alone = token.start[0], token.line.lstrip().startswith("#")
            if not (is_alone and line - 1 in lines):
                yield min(lines, default=0), " ".join(lines.values())
                lines = {}
            lines[line] = token.string.lstrip("# ")
    yield min(lines, default=0), " ".join(lines.values())


def matches(text: str, is_docstring: bool = False) -> list[tuple[str, str]]:
    """Returns rule and matched words of each violation in a text."""
    text = " ".join(CODE_BLOCK.sub("", text).split())
    violations = []
    if is_docstring and (word := FIRST_WORD.match(text)):
        violations.append(("first word", word.group()))
    for rule, pattern in COMPILED.items():
        violations += [(rule, match.group()) for match in pattern.finditer(text)]
    return violations


def texts_of(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yields line and text of everything written in a file, and True for a docstring."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tree = ast.parse(source)
        documented = docstrings(tree)
        for node, text in documented.items():
            yield node.lineno, text, True
        for node, text in strings(tree).items():
            if node not in documented:
                yield node.lineno, text, False
        for line, text in comments(source):
            yield line, text, False
    elif path.suffix == ".ipynb":
        for i, cell in enumerate(json.loads(source)["cells"]):
            yield i, "".join(cell["source"]), False
    else:
        without_code = CODE_BLOCK.sub(lambda code: "\n" * code.group().count("\n"), source)
        for number, line in enumerate(without_code.splitlines(), start=1):
            yield number, line, False


def files() -> list[Path]:
    """Returns all files that are checked."""
    folders = ("keras_gemma", "tests", "examples")
    code = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    notebooks = sorted((ROOT / "examples").rglob("*.ipynb"))
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
    pages = sorted((ROOT / "docs").rglob("*.md"))
    paths = [*code, *notebooks, *(ROOT / name for name in names), *pages]
    return [path for path in paths if path.relative_to(ROOT).as_posix() not in EXCEPTIONS]


def violations_by_file() -> dict[str, list[tuple[int, list[tuple[str, str]]]]]:
    """Returns line and violations of each text with any, by file."""
    report: dict[str, list[tuple[int, list[tuple[str, str]]]]] = {}
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        for line, text, is_docstring in texts_of(path):
            rules = matches(text, is_docstring)
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
    for name in EXCEPTIONS:
        assert any(matches(text, is_docstring) for _, text, is_docstring in texts_of(ROOT / name))


def test_strings_and_comments(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("""# The first line stands
# alone.
x = f"{x} is no {y}"  # anew
y = "beside"
""")
    found = [(line, rule) for line, *text in texts_of(path) for rule, _ in matches(*text)]
    assert sorted(found) == [(1, "alone"), (1, "stands"), (3, "anew"), (3, "negated noun")]


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
