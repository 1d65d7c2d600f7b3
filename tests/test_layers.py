"""Arrows point down only: experiments > launch > mamba3_jax > pallas_kernels, and in mamba3_jax `ops` stands alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("pallas_kernels", "mamba3_jax", "launch", "experiments", "tests")  # lowest first


def imports(source: str, package: str) -> set[str]:
    """Full names of everything that a module of `package` imports, functions' own imports included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def imports_under(folder: str) -> dict[str, set[str]]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} has no Python files"
    return {
        str(path.relative_to(ROOT)): imports(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))
        for path in files
    }


def offenders(found: dict[str, set[str]], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, names in found.items()
        for name in sorted(names)
        if any(name == above or name.startswith(above + ".") for above in forbidden)
    ]


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_no_layer_imports_one_above(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    assert not offenders(imports_under(layer), above)


def test_kernels_import_nothing_of_ours():
    assert not offenders(imports_under("pallas_kernels"), tuple(set(LAYERS) - {"pallas_kernels"}))


def test_ops_import_only_jax_numpy_and_ops():
    allowed = ("jax", "numpy", "jaxtyping", "mamba3_jax.ops", "pallas_kernels", *sys.stdlib_module_names)
    for path, names in imports_under("mamba3_jax/ops").items():
        for name in names:
            assert name.startswith(tuple(f"{top}." for top in allowed)) or name in allowed, f"{path} imports {name}"


@pytest.mark.parametrize(
    "line", ["import launch.train", "from experiments import text", "def f():\n    from launch.common import main"]
)
def test_an_arrow_up_is_caught(line):
    assert offenders({"mamba3_jax/x.py": imports(line, "mamba3_jax")}, ("launch", "experiments"))
    assert imports("from ..launch import train", "mamba3_jax.train") == {"mamba3_jax.launch.train"}


def test_types_and_steps_import_without_the_pipeline():
    code = """
import sys
for name in ("grain", "tensorflow_datasets", "tokenizers"):
    sys.modules[name] = None
import mamba3_jax.data.batch, mamba3_jax.data.packing, mamba3_jax.train.step, mamba3_jax.train.loss
from mamba3_jax.data import Batch
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("imported\n"), done.stderr[-3000:]


@pytest.mark.parametrize(("without", "package"), [("pallas_kernels", "mamba3_jax"), ("mamba3_jax", "pallas_kernels")])
def test_each_package_imports_without_the_other(without, package):
    """Every module of one package, in a process where the other (and all above) cannot be imported."""
    code = f"""
import importlib, pkgutil, sys
for name in ({without!r}, "launch", "experiments", "tests"):
    sys.modules[name] = None
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, {package!r} + "."):
    importlib.import_module(module.name)
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("imported\n"), done.stderr[-3000:]
