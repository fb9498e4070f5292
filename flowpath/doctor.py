"""`flowpath doctor`: what flowpath finds on this machine, as text for a bug report."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CORE = {
    "torch": "torch",
    "pyro": "pyro-ppl",
    "nflows": "nflows",
    "numpy": "numpy",
    "safetensors": "safetensors",
}

# extra -> the modules it brings
EXTRAS = {
    "arviz": ("arviz",),
    "bench": ("nflows", "zuko", "normflows"),
    "pandas": ("pandas",),
    "tensorboard": ("tensorboard",),
}


def report() -> str:
    """The whole report, one fact a line under four headings. Looks only; changes and installs nothing."""
    sections = {"Versions": versions(), "Device": device(), "Extras": extras(), "Disk": disk()}
    return "\n\n".join(_section(title, facts) for title, facts in sections.items())


def _section(title: str, facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join([title, *(f"  {name:<{width}}  {fact}" for name, fact in facts.items())])


def versions() -> dict[str, str]:
    """flowpath, Python, the system, and the packages flowpath stands on."""
    from flowpath import __version__

    facts = {"flowpath": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    return facts | {name: _version(package) for name, package in CORE.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"missing: pip install {package}"


def device() -> dict[str, str]:
    """CPU, threads, CUDA devices and the compiler that torch.compile needs on a CPU."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    inside, between = torch.get_num_threads(), torch.get_num_interop_threads()
    facts = {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores seen, vector capability {capability}",
        "threads": f"{inside} inside an operation, {between} between operations",
    }
    return facts | _cuda() | {"compiler": _compiler()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine() or "unknown"


def _cuda() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return {"cuda": f"no device; torch is {built}"}
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        f"cuda:{i}": f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}"
        for i, p in enumerate(found)
    }


def _compiler() -> str:
    names = [*os.environ.get("CXX", "").split()[:1], "g++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        return "none: torch.compile will run eager on a CPU; install g++ or clang++, or set CXX"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return found if headers.is_file() else f"{found}, but no Python.h: install Python's development headers"


def extras() -> dict[str, str]:
    """Which optional packages are here, and what installs those that are not."""
    return {extra: _extra(extra, modules) for extra, modules in EXTRAS.items()}


def _extra(extra: str, modules: tuple[str, ...]) -> str:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if not missing:
        return ", ".join(f"{m} {_version(m)}" for m in modules)
    return f"no {', '.join(missing)}: pip install 'flowpath[{extra}]'"


def disk() -> dict[str, str]:
    """Free space where runs are written, and the folder that holds benchmark data."""
    data = os.environ.get("FLOWPATH_DATA", "")
    held = "" if Path(data or "data").is_dir() else ", which is no folder"
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return {"free": f"{free:.1f} GiB here", "FLOWPATH_DATA": (data or "unset, so data") + held}
