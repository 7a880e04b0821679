"""The house's rules: imports point one way, heavy packages wait until they are used, csrc knows no Python."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffmem"

# What each room may import from the others; what EVERYBODY holds, and the package itself, is for all. Rooms above
# memorization reach the search through its CopyDetector.
EVERYBODY = {
    "",
    "atomic_io",
    "devices",
    "errors",
    "executors",
    "histogram",
    "html_report",
    "logs",
    "inert",
    "integrity",
    "lazy",
    "plotting",
    "precision",
    "progress",
    "recognize",
    "system",
    "text",
    "timing",
}
ALLOWED = {
    "data": set(),
    "ops": set(),
    "models": {"ops"},
    "sampling": {"models", "ops"},
    "optimum": {"models", "ops", "search", "data"},
    "training": {"models", "ops", "data", "sampling"},
    "search": {"ops", "data"},
    "features": {"data", "search", "ops"},
    "indexes": {"search", "data", "features", "ops"},
    "memorization": {"search", "data", "features", "indexes"},
    "evaluation": {"training", "models", "sampling", "data", "memorization"},
    "studies": {"evaluation", "optimum", "training", "sampling", "models", "memorization", "data"},
    "demo": {"evaluation", "training", "sampling", "memorization", "data"},
    "integrations": {"evaluation", "training", "sampling", "models", "memorization", "features", "data"},
    "environment": {"ops", "search"},
    "cli": {
        "data",
        "search",
        "features",
        "indexes",
        "memorization",
        "models",
        "evaluation",
        "sampling",
        "training",
        "studies",
        "optimum",
        "demo",
        "environment",
    },
}
LAZY = {
    "faiss",
    "fsspec",
    "h5py",
    "lmdb",
    "nibabel",
    "pydicom",
    "pyarrow",
    "simplejpeg",
    "matplotlib",
    "triton",
    "ray",
    "sklearn",
    "statsmodels",
    "datasets",
    "jinja2",
    "rich",
    "tensorboard",
}
LAZY |= {"torchmetrics", "lightning", "diffusers", "accelerate", "transformers", "wandb", "mlflow"}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first in ("__init__", "__main__") else first


def imported_modules(tree: ast.AST) -> list[str]:
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from diffmem import data` imports diffmem.data
            modules += [
                f"{node.module}.{alias.name}" if node.module == "diffmem" else node.module for alias in node.names
            ]
    return modules


def test_imports_point_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if not room or room in EVERYBODY:
            continue
        for module in imported_modules(ast.parse(path.read_text())):
            parts = module.split(".")
            if parts[0] == "diffmem" and len(parts) > 1:
                other = parts[1] if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists() else ""
                if other not in EVERYBODY | ALLOWED[room] | {room}:
                    wrong.append(f"{path.relative_to(ROOT)}: {room} must not import {other}")
    assert not wrong, "\n".join(wrong)


def imports_by_time(path: Path, modules: dict[str, Path]) -> dict[str, dict[str, set[str]]]:
    """Which modules of diffmem a module imports "at once", for "types" alone, and "later"; each with the functions that
    do ("" for none)."""
    found: dict[str, dict[str, set[str]]] = {"at once": {}, "types": {}, "later": {}}

    def visit(node: ast.AST, time: str, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                visit(child, "types", function)
            elif isinstance(child, ast.FunctionDef | ast.Lambda):
                visit(child, "later", function or getattr(child, "name", "lambda"))
            elif isinstance(child, ast.Import | ast.ImportFrom):
                module = getattr(child, "module", None)
                for alias in child.names:
                    name = alias.name if module is None else f"{module}.{alias.name}"
                    name = name if name in modules else module or name
                    # A package is loaded before its modules, whatever they import.
                    if name in modules and not (
                        modules[name].stem == "__init__" and path.is_relative_to(modules[name].parent)
                    ):
                        found[time].setdefault(name, set()).add(function)
            else:
                visit(child, time, function)

    visit(ast.parse(path.read_text()), "at once", "")
    return found


def test_no_cycles_between_modules():
    """Only a result may come back to its report, which knows it: when asked for, in one place."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    imports = {name: imports_by_time(path, modules) for name, path in modules.items()}
    graphlib.TopologicalSorter({name: set(each["at once"]) for name, each in imports.items()}).prepare()  # CycleError

    def reachable(name: str, seen: set[str]) -> set[str]:
        for other in {*imports[name]["at once"], *imports[name]["types"]} - seen:
            seen.add(other)
            reachable(other, seen)
        return seen

    wrong = []
    for name, each in imports.items():
        back = {other: places for other, places in each["later"].items() if name in reachable(other, set())}
        if len(back) > 1 or any(len(places) > 1 for places in back.values()):
            wrong.append(f"{name} comes back to {back}")
    assert not wrong, "\n".join(wrong)


def test_no_function_shadows_its_module():
    """`diffmem.memorization.audit` is the function, whatever was imported before."""
    wrong = []
    for init in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(init.read_text())
        siblings = {path.stem for path in init.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
        package = ".".join(init.parent.relative_to(ROOT).parts)
        taken = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module != package:
                taken |= {alias.asname or alias.name for alias in node.names}
        wrong += [f"{package}: {name} is a module and something else" for name in sorted(taken & siblings)]
    assert not wrong, "\n".join(wrong)


def test_rooms_have_speaking_names():
    names = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "helpers", "common", "misc"}


@pytest.fixture(scope="module")
def fresh() -> list[str]:
    """What an interpreter that has imported nothing yet says of diffmem: heavy packages that came with it; its public
    names, as `dir` shows them and as they should be; those that are not there."""
    code = (
        "import sys, diffmem; shown = dir(diffmem); diffmem.audit; diffmem.TrainingIndex; import torch, diffmem.models;"
        "assert not torch.cuda.is_initialized();"
        f"print(sorted({LAZY!r} & set(sys.modules)));"
        "print(shown); print(sorted(diffmem.__all__));"
        "print([name for name in diffmem.__all__ if getattr(diffmem, name) is None])"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


def test_import_is_light(fresh):
    """`import diffmem`, and even its audit, start no plotting, search or GPU library."""
    assert fresh[0] == "[]"


def test_core_knows_no_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.name != "module.cpp":
            text = path.read_text()
            assert "pybind11" not in text, path
            assert "torch/" not in text, path
            assert "Python.h" not in text, path


def test_front_door(fresh):
    """What `dir` shows is what is public, all of it is there without further imports, and type checkers see it."""
    _, shown, public, missing = fresh
    assert shown == public
    assert missing == "[]"
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in guarded.body for alias in node.names}
    import diffmem

    assert seen == set(diffmem.__all__) - {"__version__"}
    assert (PACKAGE / "py.typed").exists()
