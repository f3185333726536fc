"""Imports point to lower floors only, including imports inside functions."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "keras_gemma"

FLOORS = (
    ("checks", "extras"),
    ("config", "backend_choice", "version", "tf_data", "hub_caches", "progress"),
    ("buckets", "catalogue"),
    ("presettable",),
    # The floors above it.
    ("backend", "text"),
    ("quantization", "lora.low_rank"),
    ("lora.config",),
    ("model",),
    ("lora", "quantization.calibration", "losses"),
    ("model.quantize",),
    ("model.backbone",),
    ("storage", "generation", "scoring"),
    ("export",),
    ("causal_lm",),
    ("gemma3", "shield_gemma"),
    ("training", "serving", "batch", "evaluation", "distribution", "interop", "benchmark"),
    ("cli",),
    ("public names",),
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}

LAZY_IMPORTS = {
    ("keras_gemma.presettable", "keras_gemma.storage.presets"),
    ("keras_gemma.model.backbone", "keras_gemma.storage.adapters.keras_hub_lora"),
}
"""Imports inside methods that may point up: a class reads and writes its own files, as in KerasHub,
and `storage` builds the class."""

PUBLIC = ("", "models", "samplers", "tokenizers")
"""Modules that only name what others define: one unit, above all others."""

FRAMEWORKS = ("jax", "jaxlib", "torch", "tensorflow", "tensorflow_text", "keras_hub")
"""Packages that only the folders `MAY_IMPORT_FRAMEWORKS` may import. So is `keras.src`."""
MAY_IMPORT_FRAMEWORKS = ("backend", "export", "interop")

KERAS_INTERNALS = re.compile(
    r"\._(?:tracker|flatten_layers|untrack_variable|torch_params|trainable_variables"
    r"|compile_metrics|deferred_initialize|initializer|losses_for|layers)\b|keras\.src"
)
"""Attributes of Keras without a public name, which only one file may use."""


def unit_of(module: str) -> str:
    """The folder or module that `module`, a dotted name in the package, belongs to."""
    parts = module.split(".")[1:]
    name = parts[0] if parts else ""
    is_class = name[:1].isupper() or name.startswith("__")
    if name in PUBLIC or is_class:
        return "public names"
    file = ".".join(parts[:2])
    return file if file in FLOOR_OF else name


def imports_of(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of everything imported, such as `keras_gemma.backend.pack`.

    Relative imports start at `package`.
    """

    def absolute(name: str, level: int) -> str:
        base = package.split(".")[: -level + 1 or None] if level else []
        return ".".join([*base, *filter(None, [name])])

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node.module or "", node.level)
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            name = node.args[0].value.lstrip(".")
            yield node.lineno, absolute(name, len(node.args[0].value) - len(name))


def violations(source: str, module: str, package: str) -> list[str]:
    """Returns one line for each import of `module` that points up."""
    lines = []
    importer = unit_of(module)
    if importer not in FLOOR_OF:
        lines.append(f"{module}: {importer!r} has no floor yet: give it one in FLOORS")
        return lines
    for line, name in imports_of(source, package):
        place_of_import = f"{module}, line {line}: imports {name}"
        top = name.split(".")[0]
        private = name == "keras.src" or name.startswith("keras.src.")
        if (top in FRAMEWORKS or private) and importer not in MAY_IMPORT_FRAMEWORKS:
            lines.append(f"{place_of_import}, which only {' and '.join(MAY_IMPORT_FRAMEWORKS)} may")
        is_lazy = (module, name.rpartition(".")[0]) in LAZY_IMPORTS
        if top != "keras_gemma" or is_lazy:
            continue
        imported = unit_of(name)
        if imported not in FLOOR_OF:
            lines.append(f"{place_of_import}, which has no floor yet: give it one in FLOORS")
        elif imported != importer and FLOOR_OF[imported] >= FLOOR_OF[importer]:
            is_same = FLOOR_OF[imported] == FLOOR_OF[importer]
            place = "on the same floor" if is_same else "above it"
            lines.append(f"{place_of_import}, which is {place}")
    return lines


def modules() -> list:
    """Returns dotted name, package and path of every module, as test parameters."""
    parameters = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        package = ".".join(parts[:-1])
        name = package if parts[-1] == "__init__" else ".".join(parts)
        parameters.append(pytest.param(name, package, path, id=name))
    return parameters


@pytest.mark.parametrize(("module", "package", "path"), modules())
def test_imports_point_down(module, package, path):
    assert violations(path.read_text(encoding="utf-8"), module, package) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("keras_gemma.text.tokenizer", "import keras_gemma.model.rope", "above it"),
        ("keras_gemma.text.tokenizer", "from keras_gemma.backend import pack", "on the same floor"),
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
def test_finds_violations(module, source, expected):
    package = module.rpartition(".")[0]
    (line,) = violations(source, module, package)
    assert expected in line


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
def test_allowed_imports(module, source):
    assert violations(source, module, module.rpartition(".")[0]) == []


def test_keras_internals_are_in_one_file():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if KERAS_INTERNALS.search(path.read_text(encoding="utf-8"))
    }
    assert users == {"backend/keras_internals.py"}


def test_no_circles_among_files():
    names = {module.id: module.values for module in modules()}
    graph = {
        name: {
            imported
            for _, imported_name in imports_of(path.read_text(encoding="utf-8"), package)
            for imported in [file_of(imported_name, names)]
            if imported and imported != name and (name, imported) not in LAZY_IMPORTS
        }
        for name, (_, package, path) in names.items()
    }
    assert circles(graph) == []


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


def test_imports_of():
    source = """
import keras_gemma.losses
from . import rope
from .rope import rotate
from ..config import GemmaConfig
importlib.import_module("keras_gemma.checks")
importlib.import_module("..storage", __package__)
"""
    assert [name for _, name in imports_of(source, "keras_gemma.model")] == [
        "keras_gemma.losses",
        "keras_gemma.model.rope",
        "keras_gemma.model.rope.rotate",
        "keras_gemma.config.GemmaConfig",
        "keras_gemma.checks",
        "keras_gemma.storage",
    ]


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]
