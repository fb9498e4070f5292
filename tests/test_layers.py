"""The rooms of the house: imports point down only; `import flowpath` and its names are quick and change nothing."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import flowpath as fp

PACKAGE = Path(__file__).resolve().parents[1] / "flowpath"

# Bottom first. A module may import, at the top of its file, from its own layer and from those before it.
LAYERS = [
    {"registry", "_pyro"},
    {"checks", "eager", "layout", "tracing"},
    {"transform"},
    {"transforms", "nets", "standardize", "bases", "foreign_bases", "recompute"},
    {"distribution", "flow"},
    {"architectures", "draws", "interop"},
    {"estimators"},
    {"objectives", "variational"},
    {"scope"},
    {"io", "diagnostics", "supports"},
    {"training", "tables"},
    {"density", "svi"},
]
# Nothing of the library imports a leaf.
LEAVES = {"plot", "report", "testing", "doctor", "demo", "commands", "runs", "cli", "grammar", "__main__"}

HEAVY = [
    "nflows",
    "matplotlib",
    "sklearn",
    "scipy",
    "pandas",
    "polars",
    "tensorboard",
    "zuko",
    "torch._dynamo",
]


def layer(room: str) -> int:
    return next(i for i, rooms in enumerate([*LAYERS, LEAVES]) if room in rooms)


def sources() -> Iterator[Path]:
    return (path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1]


def run_on_import(nodes: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run when the module is imported: not those inside functions."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from run_on_import(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            for field in ("body", "orelse", "finalbody"):
                yield from run_on_import(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from run_on_import(handler.body)


def targets(path: Path, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """What a statement imports, as absolute names; `from flowpath import flow` counts as flowpath.flow."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if is_module(full) else base


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(path: Path) -> set[str]:
    """The modules of flowpath that `path` imports when it is imported."""
    found = (t for node in run_on_import(ast.parse(path.read_text(encoding="utf-8")).body) for t in targets(path, node))
    return {t for t in found if t.split(".")[0] == "flowpath"}


each_source = pytest.mark.parametrize("path", [pytest.param(p, id=name_of(p)) for p in sources()])


@each_source
def test_module_has_a_layer(path: Path) -> None:
    known = set.union(*LAYERS, LEAVES)
    assert room_of(name_of(path)) in known, f"give {name_of(path)} a place in LAYERS or LEAVES"


@each_source
def test_imports_point_down(path: Path) -> None:
    room = room_of(name_of(path))
    bare = [t for t in imported(path) if t == "flowpath"]
    assert not bare, "import the module that defines the name, not the package that collects them"
    up = [t for t in imported(path) if layer(room_of(t)) > layer(room)]
    assert not up, f"{name_of(path)} imports {up}, which stand above it"


def test_no_import_cycles() -> None:
    TopologicalSorter({name_of(p): imported(p) - {name_of(p)} for p in sources()}).prepare()


def test_reader_of_imports_sees_what_runs(tmp_path: Path) -> None:
    text = """
import torch
from flowpath.flow import Flow
from flowpath import flow, registry
if TYPE_CHECKING:
    import flowpath.density
try:
    import flowpath.io
except ImportError:
    import flowpath.nets
def f():
    import flowpath.cli
"""
    nodes = list(run_on_import(ast.parse(text).body))
    found = {t for node in nodes for t in targets(PACKAGE / "x.py", node)}
    assert {"torch", "flowpath.registry", "flowpath.io", "flowpath.nets"} <= found
    assert not {"flowpath.density", "flowpath.cli"} & found


def python(code: str) -> dict:
    """Run code in a fresh interpreter; its last line is JSON."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "COVERAGE"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Every public name but the one that needs scikit-learn.
ASK = "import flowpath; [getattr(flowpath, name) for name in flowpath.__all__ if name != 'FlowDensity']"


def seconds_within(limit: float, code: str) -> None:
    """Python code that prints the CPU seconds it measured as JSON stays within the limit, at best of five."""
    seconds = []
    for _ in range(5):  # other work on the machine only ever adds
        seconds.append(float(python(code)["seconds"]))
        if seconds[-1] <= limit:
            return
    pytest.fail(f"it takes {min(seconds):.2f} s, the limit is {limit}")


def test_import_of_every_name_is_quick() -> None:
    code = f"""
import time, json, torch
start = time.process_time()
{ASK}
print(json.dumps({{"seconds": time.process_time() - start}}))
"""
    seconds_within(0.6, code)


def test_import_loads_nothing_heavy() -> None:
    code = f"""
import json, sys, torch
before = set(sys.modules)
{ASK}
print(json.dumps({{"loaded": [m for m in {HEAVY!r} if m in set(sys.modules) - before]}}))
"""
    assert python(code)["loaded"] == []


def test_import_alone_does_not_load_torch() -> None:
    code = "import json, sys, flowpath; print(json.dumps({'torch': 'torch' in sys.modules, 'all': dir(flowpath)}))"
    found = python(code)
    assert not found["torch"]
    assert set(fp.__all__) <= set(found["all"])


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fit", "--help"], ["score", "--help"]], ids=" ".join)
def test_help_answers_at_once_and_without_torch(words: list[str]) -> None:
    code = f"""
import json, sys, time
from flowpath.cli import main
try:
    main({words!r})
except SystemExit as end:
    print(json.dumps({{"seconds": time.process_time(), "code": end.code, "torch": "torch" in sys.modules}}))
"""
    assert python(code) | {"seconds": 0} == {"seconds": 0, "code": 0, "torch": False}
    seconds_within(0.5, code)


def test_public_names_are_written_alike_in_their_three_places() -> None:
    """For the type checker, for `import *` and for the import on demand."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    checking = next(n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))
    typed = [a.name for n in checking.body for a in getattr(n, "names", [])]
    given = {*fp._HOME, *(n for n in fp.__all__ if is_module(f"flowpath.{n}"))}
    assert sorted(typed) == sorted(fp.__all__) == sorted(given)


def test_names_come_from_the_modules_that_define_them() -> None:
    assert [n for n in fp._HOME if getattr(fp, n) is not getattr(sys.modules[f"flowpath.{fp._HOME[n]}"], n)] == []
    assert {n for n in fp.__all__ if isinstance(getattr(fp, n), ModuleType)} == {
        n for n in fp.__all__ if n not in fp._HOME
    }


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'flowpath' has no attribute 'nfs'"):
        fp.nfs  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nfs'"):
        exec("from flowpath import nfs")


def test_files_know_every_registered_part_from_the_start() -> None:
    code = f"""
import json
import flowpath.io
from flowpath.registry import registered_names
before = registered_names()
{ASK}
import flowpath.density
print(json.dumps({{"late": sorted(set(registered_names()) - set(before))}}))
"""
    assert python(code)["late"] == []


@each_source
def test_pyro_is_imported_after_its_guard(path: Path) -> None:
    """Pyro switches the validation of all distributions on when it is imported; `_pyro` undoes that."""
    if room_of(name_of(path)) == "_pyro":
        return
    before = [] if path.name == "__init__.py" else [path.parent / "__init__.py"]
    for file in [p for p in before if p.parent != PACKAGE] + [path]:
        nodes = run_on_import(ast.parse(file.read_text(encoding="utf-8")).body)
        found = [t for node in nodes for t in targets(file, node)]
        if "flowpath._pyro" in found[: _first_of_pyro(found)]:
            return
    assert _first_of_pyro(found) == len(found), "write `from flowpath import _pyro  # noqa: F401  before Pyro` first"


def _first_of_pyro(names: list[str]) -> int:
    return next((i for i, name in enumerate(names) if name.split(".")[0] == "pyro"), len(names))


def test_import_changes_nothing_global() -> None:
    code = """
import json, logging, random, signal, sys, warnings
import numpy, torch
from torch.distributions import Distribution

Distribution.set_default_validate_args(False)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

def state():
    return {
        "validation": Distribution._validate_args,
        "dtype": str(torch.get_default_dtype()),
        "torch rng": torch.get_rng_state().tolist(),
        "python rng": str(random.getstate()),
        "numpy rng": str(numpy.random.get_state()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "warning filters": str(warnings.filters),
        "log handlers": str(logging.getLogger().handlers),
        "interrupt": str(signal.getsignal(signal.SIGINT)),
    }

before = state()
ASK
after = state()
print(json.dumps({"changed": [k for k in before if before[k] != after[k]]}))
"""
    assert python(code.replace("ASK", ASK))["changed"] == []
