"""What keeps the code readable: one direction of imports, short files and functions, an import that costs nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "horizon"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}

# A package imports only from those on its left; what shares a place knows nothing of each other.
BASE = ("errors", "units", "records", "layout", "cgroups")
FLOW = (
    ("config",),
    ("models",),
    ("plan",),
    ("store",),
    ("stream",),
    ("optim",),
    ("checkpoint",),
    ("data", "report"),
    ("planner",),
    ("runtime", "zo"),
    ("optimizers",),
    ("forecast", "frozen"),
    ("check", "diagnosis", "checkpoints", "generation"),
    ("building",),
    ("inference",),
    ("engine", "interrupts"),
    ("run_checkpoints", "sampling", "eval"),
    ("run_log", "validation"),
    ("run_settings",),
    ("trainer", "replaying", "bench"),
    ("doctor",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(FLOW) for name in names}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(tree: ast.AST) -> set[str]:
    """The parts of horizon that a module imports, at any depth and for type checking too."""
    parts = set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            names = [f"horizon.{alias.name}" for alias in node.names] if module == "horizon" else [module]
        parts |= {name.split(".")[1] for name in names if name.startswith("horizon.")}
    return parts - {"__version__"}


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            yield path, node


def wrong_imports(part: str, imported: set[str]) -> set[str]:
    if part in BASE:
        return imported - set(BASE)
    others = {name for name in imported - set(BASE) if name != part}
    return {name for name in others if RANK.get(name, len(FLOW)) >= RANK[part]}


def test_the_direction_of_imports_is_told_apart():
    assert wrong_imports("store", {"plan", "units", "store"}) == set()
    assert wrong_imports("store", {"stream", "plan"}) == {"stream"}
    assert wrong_imports("data", {"report"}) == {"report"}
    assert wrong_imports("units", {"errors", "config"}) == {"config"}
    assert imported_parts(ast.parse("def f():\n  from horizon.plan.memory import x\n  import horizon.store.arena")) == {
        "plan",
        "store",
    }
    assert imported_parts(ast.parse("from horizon import trainer, __version__")) == {"trainer"}


@pytest.mark.parametrize("part", sorted({part_of(path) for path in FILES} - {"__init__"}))
def test_imports_point_to_the_left(part):
    """But for those of `__init__`, whose names come from everywhere, on first use."""
    assert part in RANK or part in BASE, f"{part} has no place in FLOW"
    wrong = {str(path): wrong_imports(part, imported_parts(TREES[path])) for path in FILES if part_of(path) == part}
    assert not {path: parts for path, parts in wrong.items() if parts}


def test_files_and_functions_are_short():
    assert not {str(path) for path in FILES if len(path.read_text().splitlines()) > 400}
    functions = [(path, node) for path, node in nodes() if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(functions) > 1000
    assert not {f"{path}: {node.name}" for path, node in functions if node.end_lineno - node.lineno >= 60}


def test_no_bare_except_and_no_pickle():
    for path, node in nodes():
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{where}: bare except"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not {"pickle", "cloudpickle", "dill", "marshal"} & set(modules), f"{where}: pickle"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), f"{where}: torch.load unpickles"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_horizon_is_light_and_its_public_names_resolve_and_touch_no_device():
    code = (
        "import sys, torch\n"
        "import horizon\n"
        "print([m for m in ('transformers', 'hydra', 'omegaconf', 'tokenizers', 'numba', 'matplotlib')"
        " if m in sys.modules])\n"
        "assert all(getattr(horizon, name) is not None for name in horizon.__all__)\n"
        "assert set(horizon.__all__) == set(dir(horizon))\n"
        "print(horizon.MemoryConfig().weight_slots, horizon.errors.BudgetError.__name__, torch.cuda.is_initialized())"
    )
    heavy, names = python(code).splitlines()
    assert heavy == "[]"
    assert names.split() == ["None", "BudgetError", "False"]


def test_an_unknown_public_name_is_an_attribute_error():
    import horizon

    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        horizon.Engin  # noqa: B018
