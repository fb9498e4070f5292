"""What is shipped: the wheel, its metadata, and the files that name versions."""

from __future__ import annotations

import email
import email.message
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flowpath
import flowpath as fp

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".*",
    "runs",
    "data",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "results",
    "*.png",
    "*.csv",
    "*.safetensors",
)


def pip(*words: str | Path, environment: Path | None = None) -> subprocess.CompletedProcess[str]:
    """pip with no index, no configuration and no environment variables of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
    target = [] if environment is None else ["--python", str(environment)]
    command = [sys.executable, "-m", "pip", *target, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy, with the setuptools that is installed."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools>=77")
    pytest.importorskip("pip", reason="building the wheel needs pip")
    there = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, there / "tree", ignore=LEFT_OUT)
    done = pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", there, there / "tree")
    assert done.returncode == 0, done.stderr
    return next(there.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(z.read(name))


def required(metadata: email.message.Message) -> list[Requirement]:
    """What a plain install asks for, extras left out."""
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_wheel_holds_flowpath_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        tops = {name.split("/")[0] for name in z.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"flowpath"}


def test_wheel_holds_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        held = {name for name in z.namelist() if name.startswith("flowpath/")}
    written = {p.relative_to(ROOT).as_posix() for p in (ROOT / "flowpath").rglob("*.py")}
    assert held == written | {"flowpath/py.typed"}


def test_wheel_installs_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith("entry_points.txt"))
        assert "flowpath = flowpath.cli:main" in z.read(name).decode()


def test_metadata_says_version_and_licence(metadata: email.message.Message) -> None:
    assert metadata["Version"] == flowpath.__version__
    assert metadata["License-Expression"] == "MIT"


@pytest.mark.parametrize("torch", ["2.6.0", "2.11.0+cu130", "2.13.0+cpu", "2.15.0+rocm7.2", "2.14.0.dev20260601+cu130"])
def test_metadata_accepts_the_torch_that_is_there(metadata: email.message.Message, torch: str) -> None:
    asked = next(r for r in required(metadata) if r.name == "torch")
    assert asked.specifier.contains(torch, prereleases=True)
    assert asked.url is None


def test_install_leaves_a_cuda_torch_alone(wheel: Path, metadata: email.message.Message, tmp_path: Path) -> None:
    """pip installs the wheel, with dependencies, into an environment that owns a CUDA build of torch."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    site = next(environment.rglob("site-packages"))
    for requirement in required(metadata):
        least = next((s.version for s in requirement.specifier), "1.0")
        pretend_installed(site, requirement.name, "2.11.0+cu130" if requirement.name == "torch" else least)
    done = pip("install", wheel, environment=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in site.glob("torch-*")) == ["torch-2.11.0+cu130.dist-info"]
    assert (site / "flowpath" / "py.typed").is_file()


def pretend_installed(site: Path, name: str, version: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("")


def test_make_and_constraints_name_one_torch() -> None:
    make = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pinned = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert make is not None and pinned is not None
    assert make.group(1) == pinned.group()
    assert make.group(1) in (ROOT / "README.md").read_text()


def test_changelog_has_a_place_for_what_comes() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
WITHOUT_CODE = {"docs/api.md", "docs/choosing.md"}


def test_every_public_name_has_a_line_in_the_api_page() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in fp.__all__ if f"| `fp.{name}` |" not in text] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p not in WITHOUT_CODE])
def test_examples_of_a_page_run(page: str, tmp_path: Path) -> None:
    """The python blocks of a page, one after another, in a fresh interpreter and an empty folder."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "page.py").write_text("\n".join(blocks))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "page.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert blocks and done.returncode == 0, done.stderr
