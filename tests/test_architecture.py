"""The house rules that code can check: who imports whom, sizes, opening sentences, annotations."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("workloads", "search_spaces", "orchestrator", "dashboards")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# First path component -> modules of ours that it may import.
OURS = {
    "workloads": ("workloads",),
    "search_spaces": ("search_spaces",),
    "orchestrator": ("orchestrator", "search_spaces", "workloads", "dashboards"),
    "dashboards": (
        "dashboards",
        "workloads.record",
        "workloads.errors",
        "workloads.config",
        "workloads.evaluation.conflict",
        "workloads.evaluation.continual",
        "workloads.evaluation.forms",
        "workloads.evaluation.statistics",
    ),
}
# Third party -> where it may be imported.
HOMES = {
    "ray": ("orchestrator", "search_spaces"),
    "mlflow": ("orchestrator.tracking", "dashboards.load"),
    "torch": ("workloads",),
    "transformers": ("workloads",),
    "deepspeed": ("workloads.training.engine",),
    "peft": ("workloads.benchmarks.peers",),
}
# Layers inside workloads, lowest first; a file imports its own layer or lower ones.
LAYERS = (
    ("__version__", "errors", "schema", "config", "record", "routing", "environment"),
    ("adapters", "llava", "data", "identity", "meeting", "assets"),
    ("training", "evaluation"),
    ("results", "run", "ahead", "benchmarks", "export", "footprint"),
)
LIGHT = (
    "workloads.config", "workloads.schema", "workloads.record", "workloads.evaluation.conflict",
    "workloads.evaluation.statistics", "workloads.evaluation.forms",
    "workloads.evaluation.continual", "workloads.evaluation.matrix_file", "orchestrator.commands.metrics",
    "workloads.evaluation.predictions", "workloads.evaluation.scorers", "orchestrator.study", "dashboards.load",
    "dashboards.tables", "dashboards.page", "workloads.benchmarks.cases",
)  # fmt: skip


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Every module that a file imports anywhere, `from a import b` as both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module, prefixes):
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_packages_import_only_what_they_may(path):
    module = module_of(path)
    for imported in imports(path):
        top = imported.split(".")[0]
        if top in PACKAGES:
            assert within(imported, OURS[module.split(".")[0]]), f"{module} imports {imported}"
        if top in HOMES:
            assert within(module, HOMES[top]), f"{module} imports {imported}"


def layer_of(module):
    part = module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if part in names)


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if module_of(p).count(".") and p.parts[len(ROOT.parts)] == "workloads"],
    ids=module_of,
)
def test_layers_of_workloads_import_downwards(path):
    module = module_of(path)
    tree = ast.parse(path.read_text())
    top_level = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    for node in top_level:
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{a.name}" for a in node.names]
        )
        for name in names:
            if name.startswith("workloads.") and name.split(".")[1] != "__init__":
                assert layer_of(name) <= layer_of(module), f"{module} imports {name}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name == "adapters" and p.parts[-3] == "workloads"], ids=module_of
)
def test_methods_never_import_each_other(path):
    if path.stem in ("__init__", "base"):
        return
    siblings = {p.stem for p in path.parent.glob("*.py")} - {"__init__", "base"}
    for imported in imports(path):
        if imported.startswith("workloads.adapters."):
            assert imported.split(".")[2] not in siblings, f"{path.name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_open_with_a_sentence_and_stay_small(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 300, "at most 300 lines"
    docstring = ast.get_docstring(tree)
    assert docstring, "no opening sentence"
    assert docstring.split("\n\n")[0].rstrip().endswith((".", ":")), "the opening is a sentence"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name}: {length} lines, at most 60"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_inheritance_is_one_level_and_data_is_frozen(path):
    ours = {n.name: n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)}
    for node in ours.values():
        parents = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in ours]
        for parent in parents:
            grand = [b.id for b in ours[parent].bases if isinstance(b, ast.Name) and b.id in ours]
            assert not grand, f"{node.name} inherits over two levels"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_without_torch_ray_or_mlflow(module):
    heavy = "{'torch', 'ray', 'mlflow', 'transformers'}"
    code = f"import sys, {module}; bad = {heavy} & set(sys.modules); assert not bad, bad"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr


def test_every_method_has_an_arm_and_every_arm_a_method():
    from search_spaces.adapters import ARMS
    from workloads.config import methods

    assert set(ARMS) == set(methods())
