"""The house: imports point down, nothing is long, and transformers is known where it has to be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cachepress

ROOT = Path(cachepress.__file__).parent
FLOORS = (
    (
        "errors",
        "limits",
        "files",
        "structured",
        "interrupts",
        "deprecated",
        "version",
        "compiling",
        "settings",
    ),
    ("checks", "ops", "kvpress_names", "options"),
    ("measure", "reconstruction", "cache"),
    ("view", "ranks", "budgets", "schedules"),
    ("press", "given"),
    ("call", "query_stats", "engine"),
    ("models", "hf"),
    ("artefacts", "generation"),
    ("presses",),
    ("spec",),
    ("evaluation", "train", "fits", "bench", "catalogue"),
    ("pages",),
    ("cli", "__main__", "_pipelines", ""),
)
"""Modules and packages, the lowest first; each imports from its own floor and those below."""
KNOW_TRANSFORMERS = ("hf", "models", "generation")
CACHE_LAYER = (
    *("cache.layer", "cache.protocol", "cache.batch", "cache.joined", "cache.hybrid"),
    "cache.window",
)
"""The cache-layer protocol of transformers, which a compressed layer fulfils."""
LONGEST_FILE, LONGEST_FUNCTION = 400, 50
STILL_LONG: set[str] = set()
"""Files that are longer until they are split; nothing is ever added."""
KERNELS = {"ops.column_kernel", "ops.paged_attention.triton_kernels"}
"""A kernel is one function, whatever it takes."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str) -> set[str]:
    """What a module imports when it is imported, by full name."""
    found: set[str] = set()
    for node in TREES[name].body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("cachepress.") in MODULES else node.module)
    return found


def ours(name: str) -> set[str]:
    """The modules of the package that a module imports when it is imported."""
    inner = {x.removeprefix("cachepress.") for x in imports(name) if x.startswith("cachepress.")}
    return {x for x in inner if x in MODULES} - {name}


def floor(name: str) -> int:
    first = name.split(".")[0]
    (found,) = [i for i, names in enumerate(FLOORS) if first in names]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    assert {x for x in ours(name) if floor(x) > floor(name)} == set()


def test_no_import_goes_in_a_circle():
    graph = {name: ours(name) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", MODULES)
def test_transformers_is_imported_where_it_is_known(name):
    if any(x.split(".")[0] == "transformers" for x in imports(name)):
        assert name in CACHE_LAYER or name.split(".")[0] in KNOW_TRANSFORMERS


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert (lines <= LONGEST_FILE) == (name not in STILL_LONG)


@pytest.mark.parametrize("name", sorted({*MODULES} - KERNELS))
def test_functions_are_short(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = node.body[0].end_lineno - node.lineno if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno - said < LONGEST_FUNCTION, node.name
