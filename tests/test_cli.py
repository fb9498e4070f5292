"""The command line: help, exit codes, one-line errors, and what doctor reports."""

from __future__ import annotations

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import flowpath
from flowpath import cli, doctor, grammar

ROOT = Path(__file__).resolve().parents[1]


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch):
    """Make `flowpath doctor` raise."""

    def set_error(error: BaseException) -> None:
        def run(args: object) -> None:
            raise error

        monkeypatch.setattr(grammar, "_doctor", run)

    return set_error


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert "demo" in text and "doctor" in text


def test_the_grammar_needs_the_standard_library_alone() -> None:
    trees = [ast.parse((ROOT / "flowpath" / name).read_text()) for name in ("cli.py", "grammar.py")]
    found = [n for tree in trees for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {(n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name).partition(".")[0] for n in found}
    assert names <= sys.stdlib_module_names | {"flowpath"}  # the grammar; that no torch comes along is tested too


@pytest.mark.parametrize("command", ["fit", "sample", "score", "check", "demo", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert len(capsys.readouterr().out.split()) > 20


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"flowpath {flowpath.__version__}\n"


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["demo", "--seed", "x"], ["demo", "--fast"], ["doctor", "now"]], ids=" ".join
)
def test_a_wrong_command_line_is_one_line_and_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert len(errors(capsys)) == 1


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError, ImportError])
def test_a_user_error_is_one_line_and_exit_2(kind, raising, capsys: pytest.CaptureFixture[str]) -> None:
    raising(kind("x has\n  no rows"))
    assert cli.main(["doctor"]) == 2
    assert errors(capsys) == ["flowpath: x has no rows"]


def test_an_error_without_words_is_named(raising, capsys: pytest.CaptureFixture[str]) -> None:
    raising(ValueError())
    assert cli.main(["doctor"]) == 2
    assert errors(capsys) == ["flowpath: ValueError"]


def test_debug_shows_the_traceback(raising) -> None:
    raising(ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        cli.main(["--debug", "doctor"])


def test_an_error_of_ours_is_not_hidden(raising) -> None:
    raising(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])


def test_interrupt(raising, capsys: pytest.CaptureFixture[str]) -> None:
    raising(KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
    assert errors(capsys) == ["flowpath: interrupted"]


def test_demo_gets_its_flags_and_replaces_nothing_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = []
    fake = types.ModuleType("flowpath.demo")
    fake.main = lambda out, *, seed, quick: calls.append((out, seed, quick))
    monkeypatch.setitem(sys.modules, "flowpath.demo", fake)
    monkeypatch.setattr(flowpath, "demo", fake, raising=False)
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--out", "here", "--seed", "3", "--quick"]) == 0
    assert calls == [(Path("runs/demo"), 0, False), (Path("here"), 3, True)]
    Path("here").mkdir()
    Path("here/flow.safetensors").touch()
    assert cli.main(["demo", "--out", "here"]) == 2
    assert errors(capsys) == [
        "flowpath: --out here holds files already: pass --force to replace them, or another --out"
    ]
    assert cli.main(["demo", "--out", "here", "--force"]) == 0
    assert len(calls) == 3


def test_doctor_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for fact in (
        flowpath.__version__,
        torch.__version__,
        "pyro",
        "nflows",
        "numpy",
        "threads",
        "compiler",
        "GiB",
    ):
        assert fact in text


def test_module_runs_and_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "flowpath", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as run:
        run.stdout.close()
        message = run.stderr.read()
    assert (run.returncode, message) == (0, "")


def test_doctor_knows_every_extra_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"test", "dev"}


def test_doctor_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "pandas", ("no_such_module",))
    monkeypatch.setitem(doctor.CORE, "nflows", "no-such-package")
    assert doctor.extras()["pandas"] == "no no_such_module: pip install 'flowpath[pandas]'"
    assert doctor.versions()["nflows"] == "missing: pip install no-such-package"


def test_doctor_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.device()["compiler"].startswith("none")


def test_doctor_takes_the_compiler_of_CXX(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "my++ -O1")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    assert doctor.device()["compiler"].startswith("/bin/my++")


def test_doctor_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert doctor.device()["cpu"]


def test_doctor_names_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    card = types.SimpleNamespace(name="Card", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    assert doctor.device()["cuda:0"] == "Card, 80 GiB, compute 9.0"


@pytest.mark.parametrize("exists", [True, False])
def test_doctor_says_where_data_is(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path if exists else tmp_path / "gone"
    monkeypatch.setenv("FLOWPATH_DATA", str(folder))
    assert doctor.disk()["FLOWPATH_DATA"] == str(folder) + ("" if exists else ", which is no folder")
