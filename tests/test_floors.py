"""Imports point to lower floors only: this file reads them, also those inside functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "keras_gemma"

FLOORS = (
    # The ground floor, where modules import one another.
    ("checks", "config", "backend_choice", "version", "tf_data", "hub_caches", "progress"),
    ("buckets", "catalogue"),
    ("presettable",),
    # The floors above it.
    ("backend", "text"),
    ("quantization", "lora.low_rank"),
    ("lora.config",),
    ("model",),
    ("lora", "quantization.calibration", "losses"),
    ("model.backbone",),
    ("storage", "generation", "scoring"),
    ("export",),
    ("causal_lm",),
    ("training", "serving", "evaluation", "distribution", "interop", "benchmark"),
    ("cli",),
    ("public names",),
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}

LAZY_IMPORTS = {
    ("keras_gemma.presettable", "keras_gemma.storage.presets"),
    ("keras_gemma.lora.adaptable_backbone", "keras_gemma.storage.adapters.keras_hub_lora"),
}
"""Imports inside methods that may point up: a class reads and writes its own files, as in KerasHub,
and `storage` builds the class."""

PUBLIC = ("", "models", "samplers", "tokenizers")
"""Modules that only name what others define: one unit, above all others."""

FRAMEWORKS = ("jax", "jaxlib", "torch", "tensorflow", "tensorflow_text", "keras_hub")
"""What only these may import, with Keras's private parts, `keras.src`."""
MAY_IMPORT_FRAMEWORKS = ("backend", "export", "interop")


def unit_of(module: str) -> str:
    """The folder or module that `module`, a dotted name in the package, belongs to."""
    parts = module.split(".")[1:]
    name = parts[0] if parts else ""
    is_class = name[:1].isupper() or name.startswith("__")
    if name in PUBLIC or is_class:
        return "public names"
    file = ".".join(parts[:2])
    return file if file in FLOOR_OF else name


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import; `package` is where relative ones start."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -node.level + 1 or None] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            if module in ("keras_gemma", "keras"):
                for alias in node.names:
                    yield node.lineno, f"{module}.{alias.name}"
            else:
                yield node.lineno, module
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, node.args[0].value


def violations(source: str, module: str, package: str) -> list[str]:
    """What the imports of `module` break, one line each."""
    found = []
    importer = unit_of(module)
    if importer not in FLOOR_OF:
        found.append(f"{module}: {importer!r} has no floor yet: give it one in FLOORS")
        return found
    for line, name in imported_modules(source, package):
        here = f"{module}, line {line}: imports {name}"
        top = name.split(".")[0]
        private = name == "keras.src" or name.startswith("keras.src.")
        if (top in FRAMEWORKS or private) and importer not in MAY_IMPORT_FRAMEWORKS:
            found.append(f"{here}, which only {' and '.join(MAY_IMPORT_FRAMEWORKS)} may")
        if top != "keras_gemma" or (module, name) in LAZY_IMPORTS:
            continue
        imported = unit_of(name)
        if imported not in FLOOR_OF:
            found.append(f"{here}, which has no floor yet: give it one in FLOORS")
        elif imported != importer and FLOOR_OF[imported] >= FLOOR_OF[importer]:
            place = "beside it" if FLOOR_OF[imported] == FLOOR_OF[importer] else "above it"
            found.append(f"{here}, which is {place}")
    return found


def modules() -> list:
    """Dotted name, package and path of every module of `keras_gemma`: test parameters."""
    listed = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        package = ".".join(parts[:-1])
        name = package if parts[-1] == "__init__" else ".".join(parts)
        listed.append(pytest.param(name, package, path, id=name))
    return listed


@pytest.mark.parametrize(("module", "package", "path"), modules())
def test_imports_point_down(module, package, path):
    assert violations(path.read_text(encoding="utf-8"), module, package) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("keras_gemma.text.tokenizer", "import keras_gemma.model.rope", "above it"),
        ("keras_gemma.text.tokenizer", "from keras_gemma.backend import pack", "beside it"),
        ("keras_gemma.model.rope", "def f():\n    from ..causal_lm import X", "above it"),
        ("keras_gemma.model.rope", "from keras_gemma import GemmaBackbone", "above it"),
        ("keras_gemma.model.rope", "from keras_gemma import models", "above it"),
        ("keras_gemma.model.rope", "from .. import models", "above it"),
        ("keras_gemma.model.rope", "import jax.numpy as jnp", "only backend"),
        ("keras_gemma.model.rope", "if True:\n    import torch", "only backend"),
        ("keras_gemma.model.rope", "from keras.src.backend import x", "only backend"),
        ("keras_gemma.model.rope", "from keras import src", "only backend"),
        ("keras_gemma.model.rope", "importlib.import_module('tensorflow')", "only backend"),
        ("keras_gemma.novelty", "", "has no floor"),
    ],
)
def test_a_violation_is_found(module, source, expected):
    package = module.rpartition(".")[0]
    found = violations(source, module, package)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("keras_gemma.model.rope", "import keras\nfrom keras import ops\nimport numpy"),
        ("keras_gemma.model.rope", "from keras_gemma.backend import x\nfrom . import attention"),
        ("keras_gemma.model.rope", "from .attention import x\nfrom ..config import GemmaConfig"),
        ("keras_gemma.backend.jax", "import jax\nfrom keras.src import backend"),
        ("keras_gemma.models", "from keras_gemma import GemmaBackbone, samplers, causal_lm"),
    ],
)
def test_what_is_allowed(module, source):
    assert violations(source, module, module.rpartition(".")[0]) == []


def test_no_circles_among_files():
    names = {module.id: module.values for module in modules()}
    graph = {
        name: {
            imported
            for _, line_name in imports_of(path.read_text(encoding="utf-8"))
            for imported in [file_of(line_name, names)]
            if imported and imported != name and (name, imported) not in LAZY_IMPORTS
        }
        for name, (_, _, path) in names.items()
    }
    assert circles(graph) == []


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each thing imported, with the names of `from` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name


def file_of(name: str, names: dict) -> str | None:
    """Returns the module that `name` is, or is defined in; None if it is not the package's."""
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name if "." in name else None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that import each other (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return groups


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]
