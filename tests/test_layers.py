"""Arrows point down only: experiments > launch > mamba3_jax > pallas_kernels, and in mamba3_jax `ops` stands alone."""

import ast
import os
import shutil
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
@pytest.mark.parametrize("backend", ["triton", "mosaic_gpu", "mosaic_tpu"])
def test_a_backend_can_be_deleted(backend, tmp_path):
    """Its folder and its line of the table go: everything else imports, and the op runs by the other backends."""
    for package in ("mamba3_jax", "pallas_kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "pallas_kernels" / "ssm" / backend)
    table = tmp_path / "mamba3_jax" / "ops" / "kernels.py"
    lines = table.read_text().splitlines(keepends=True)
    left = [line for line in lines if not line.startswith(f'    "{backend}": ')]
    assert len(left) == len(lines) - 1
    table.write_text("".join(left))
    code = """
import functools, importlib, pkgutil
import jax, jax.numpy as jnp
import mamba3_jax, pallas_kernels
for package in (mamba3_jax, pallas_kernels):
    assert package.__path__[0].startswith(PATH), package.__path__
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from mamba3_jax.ops.kernels import IMPLEMENTATIONS
from mamba3_jax.ops.ssm import Heads, Tokens, ssm
def both(length, **how):
    f = lambda *sizes, dtype=jnp.float32: jnp.ones((1, length, *sizes), dtype)
    q = f(1, 1, 64, dtype=jnp.bfloat16)
    tokens = Tokens(q, q, f(2, 64, dtype=jnp.bfloat16), None, log_a_BLH=-f(2), gamma_BLH=f(2), beta_BLH=f(2))
    op = lambda tokens: ssm(tokens, Heads(), **how)[0] if not isinstance(how.get("run"), functools.partial) else (
        how["run"](tokens, Heads(), None, rotation="half", interpret=True)[0])
    return jax.eval_shape(jax.grad(lambda tokens: op(tokens).astype(jnp.float32).sum()), tokens)
for run in IMPLEMENTATIONS.values():
    both(70, run=run), both(1, run=run)
both(70), both(1)
print("ran", *IMPLEMENTATIONS)
"""
    code = code.replace("PATH", repr(str(tmp_path)))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("ran "), done.stderr[-3000:]
    assert backend not in done.stdout.split()


OURS = ("mamba3_jax", "pallas_kernels", "launch", "experiments")
MOST = 4  # positional fields: of more, two of one shape and dtype can change places, and nobody sees it


def tuples_of(sources: list[str]) -> dict[str, int]:
    """Names of the NamedTuples and dataclasses that modules define, and how many fields each has (of the largest)."""
    found = {}
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ClassDef):
            above = [ast.unparse(base) for base in (*node.bases, *node.decorator_list)]
            if any("NamedTuple" in name or "dataclass" in name for name in above):
                fields = sum(isinstance(line, ast.AnnAssign) for line in node.body)
                found[node.name] = max(fields, found.get(node.name, 0))
    return found


def by_position(source: str, tuples: dict[str, int]) -> list[str]:
    """Lines that construct one of `tuples` by position, with more than `MOST` arguments, or as many as come."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or tuples.get(ast.unparse(node.func).split(".")[-1], 0) <= MOST:
            continue
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        if len(node.args) > MOST or starred:
            found.append(f"{node.lineno}: {ast.unparse(node)[:90]}")
    return found


def by_number(source: str, tuples: dict[str, int]) -> list[str]:
    """Lines that take a field of a tuple of ours by its number, or slice it: of parameters annotated with one."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = [*function.args.args, *function.args.kwonlyargs]
        named = {
            argument.arg
            for argument in arguments
            if argument.annotation is not None and ast.unparse(argument.annotation).split(".")[-1] in tuples
        }
        for node in ast.walk(function):
            number = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice | ast.Constant | ast.UnaryOp)
            if number and isinstance(node.value, ast.Name) and node.value.id in named:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def sources(folders: tuple[str, ...]) -> dict[str, str]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


@pytest.mark.full
@pytest.mark.parametrize("rule", [by_position, by_number])
def test_fields_are_named(rule):
    ours = sources(OURS)
    tuples = tuples_of(list(ours.values()))
    assert [f"{path}:{line}" for path, source in ours.items() for line in rule(source, tuples)] == []


def test_a_field_by_position_or_number_is_caught():
    source = """
class Refs(NamedTuple):
    a: int; b: int; c: int; d: int; e: int
def f(refs: Refs, other):
    Refs(1, 2, 3, 4, 5)
    Refs(*other)
    Refs(1, 2, 3, d=4, e=5)
    refs[-3:], refs[0], other[1]
"""
    tuples = tuples_of([source])
    assert [line.split(":")[0] for line in by_position(source, tuples)] == ["5", "6"]
    assert [line.split(": ")[1] for line in by_number(source, tuples)] == ["refs[-3:]", "refs[0]"]


def test_no_import_circle():
    """In the library and the kernels, functions' own imports included."""
    found = {}
    for folder in ("mamba3_jax", "pallas_kernels"):
        for path, names in imports_under(folder).items():
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found[module] = names
    arrows = {
        module: {name if name in found else name.rpartition(".")[0] for name in names} & {*found} - {module}
        for module, names in found.items()
    }
    assert circle(arrows) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A path that ends where it begins, or nothing."""
    done = set()

    def follow(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(arrows[module]):
            if round_trip := follow(other, [*path, module]):
                return round_trip
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := follow(module, []))), [])
