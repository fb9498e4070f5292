"""fit, sample, score and check from the command line: what they leave, and one line for each of fifty mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import flowpath as fp
from flowpath import cli, runs

ROOT = Path(__file__).resolve().parents[1]
ROWS = 120
QUICK = ["--arch", "gaussian", "--epochs", "1", "--device", "cpu"]


def catalogue(rows: int = ROWS) -> pl.DataFrame:
    """A small table with a name, a context, a positive column, a real one, a whole number and weights."""
    rng = np.random.default_rng(0)
    z = rng.uniform(0.1, 1.0, rows)
    return pl.DataFrame(
        {
            "object": [f"G{i:03d}" for i in range(rows)],
            "z": z,
            "mag": 20.0 + z + rng.normal(size=rows),
            "size": rng.lognormal(size=rows),
            "n_det": rng.poisson(4, rows),
            "w": rng.uniform(0.5, 1.5, rows),
        }
    )


SUPPORTS = 'size = "positive"\nn_det = "integer(0)"\nz = "positive"\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the catalogue, a conditional run with supports and weights, and a plain run of two columns."""
    folder = tmp_path_factory.mktemp("made")
    catalogue().write_csv(folder / "cat.csv")
    (folder / "supports.toml").write_text(SUPPORTS)
    asked = ["--columns", "mag,size,n_det", "--context", "z", "--weights", "w", "--test", "0.2"]
    words = ["fit", str(folder / "cat.csv"), *asked, "--supports", str(folder / "supports.toml")]
    with torch.random.fork_rng(devices=[]):
        assert cli.main([*words, *QUICK, "--out", str(folder / "given")]) == 0
        words = ["fit", str(folder / "cat.csv"), "--columns", "mag,size"]
        assert cli.main([*words, *QUICK, "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with copies of all that."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(command: str) -> int:
    """The exit code of a command line; argparse ends by raising."""
    try:
        return cli.main(shlex.split(command))
    except SystemExit as end:
        return int(end.code or 0)


def test_fit_leaves_a_run(made: Path) -> None:
    names = {p.name for p in (made / "given").iterdir()}
    assert names >= {"flow.safetensors", "table.json", "history.csv", "fit.json", "held_out.parquet", "report.html"}
    assert pl.read_parquet(made / "given" / "held_out.parquet").columns == ["mag", "size", "n_det", "z", "w"]
    assert pl.read_parquet(made / "given" / "held_out.parquet").height == 0.2 * ROWS


def test_a_run_is_a_FlowDensity(made: Path) -> None:
    model = fp.FlowDensity.load(made / "given")
    assert [repr(s) for s in model.supports_] == ["real()", "positive()", "integer(0)"]
    assert model.context_names_ == ("z",)


def test_fit_prints_the_columns_first_and_then_the_verdict(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit cat.csv --columns mag,size --arch gaussian --epochs 1 --out new") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["column", "dtype"]
    text = "\n".join(lines)
    assert text.index("column") < text.index("nats a row") < text.index("cannot be told") < text.index("report: new")
    assert text.count("nats a row") == text.count("cannot be told") == 1


def test_supports_are_proposed_as_a_file_and_not_applied(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit cat.csv --columns size,n_det --arch gaussian --epochs 1 --out new") == 0
    out = capsys.readouterr().out
    proposed = "\n".join(re.findall(r"^  (\w+ = .*)$", out, re.MULTILINE))
    assert proposed == 'size = "positive()"\nn_det = "integer(0)"'
    assert all(s == fp.real() for s in fp.FlowDensity.load("new").supports_)
    Path("proposed.toml").write_text(proposed)
    assert run("fit cat.csv --columns size,n_det --supports proposed.toml --arch gaussian --epochs 1 --out two") == 0
    assert "proposed" not in capsys.readouterr().out.replace("proposed.toml", "")


def test_the_same_seed_gives_the_same_run(here: Path) -> None:
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(f"fit cat.csv --columns mag,size --arch gaussian --epochs 1 --seed {seed} --out {out}") == 0
    assert len({json.loads(Path(out, "fit.json").read_text())["validation_log_prob"] for out in "abc"}) == 2


def test_fit_without_rows_held_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "fit cat.csv --columns mag,size --arch gaussian --epochs 1 --validation 0 --out new"
    assert run(command) == 0
    assert "no rows were held out" in capsys.readouterr().out
    assert not Path("new/held_out.parquet").exists()
    assert run("check new") == 2
    assert "held no rows out" in capsys.readouterr().err


def test_rows_that_miss_a_value_are_dropped_and_score_nan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = catalogue().with_columns(mag=pl.when(pl.int_range(ROWS) % 10 == 3).then(None).otherwise("mag"))
    table.write_parquet("holes.parquet")
    assert run("fit holes.parquet --columns mag,size --missing drop --arch gaussian --epochs 1 --out new") == 0
    assert "12 rows with missing values dropped" in capsys.readouterr().out
    held = pl.read_parquet("new/held_out.parquet")
    assert not held.null_count().row(0)[0]
    assert held.join(table, on=["mag", "size"], how="semi").height == held.height
    assert run("score new holes.parquet --out s.parquet") == 0
    assert pl.read_parquet("s.parquet")["log_prob"].is_nan().arg_true().to_list() == list(range(3, ROWS, 10))
    assert "12 missing a value: NaN" in capsys.readouterr().out
    assert run("score run holes.parquet --missing drop --out t.parquet") == 0
    assert run("check new holes.parquet") == 0
    assert "12 rows with missing values dropped" in capsys.readouterr().out


def test_values_on_a_bound_are_nudged_where_asked(here: Path) -> None:
    catalogue().with_columns(size=pl.when(pl.int_range(ROWS) == 5).then(0.0).otherwise("size")).write_csv("b.csv")
    words = "fit b.csv --columns mag,size --supports supports.toml --arch gaussian --epochs 1 --out new"
    assert run(words.replace("supports.toml", "s.toml")) == 2
    Path("s.toml").write_text('size = "positive"\n')
    assert run(f"{words.replace('supports.toml', 's.toml')} --at-bound nudge") == 0
    assert fp.FlowDensity.load("new").counts_["nudged"] == 1


def test_scores_are_in_row_order_beside_the_id(here: Path) -> None:
    assert run("score given cat.csv --id object --out scores.csv") == 0
    scores, table = pl.read_csv("scores.csv"), catalogue()
    assert scores["object"].to_list() == table["object"].to_list()
    want = fp.FlowDensity.load("given").score_samples(table, table[["z"]])
    np.testing.assert_allclose(scores["log_prob"].to_numpy(), want, rtol=1e-9)


def test_rows_are_numbered_where_there_is_no_id(here: Path) -> None:
    assert run("score run cat.csv --out scores.csv.gz") == 0
    assert fp.tables.read("scores.csv.gz")["row"].to_list() == list(range(ROWS))


def test_rows_outside_the_supports_score_minus_infinity(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue(10).with_columns(size=-pl.col("size")).write_csv("bad.csv")
    assert run("score given bad.csv --out scores.parquet") == 0
    assert bool((pl.read_parquet("scores.parquet")["log_prob"] == -np.inf).all())
    assert "10 outside the supports: -inf" in capsys.readouterr().out


def test_samples_have_the_columns_and_types_of_the_table(here: Path) -> None:
    assert run("sample given -n 50 --given z=0.5 --out mock.parquet") == 0
    mock = pl.read_parquet("mock.parquet")
    assert mock.schema == {"mag": pl.Float64, "size": pl.Float64, "n_det": pl.Int64}
    assert mock.height == 50 and bool((mock["size"] > 0).all()) and bool((mock["n_det"] >= 0).all())


def test_samples_go_with_the_seed(here: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(f"sample run -n 5 --seed {seed} --out {out}.npy") == 0
    a, b, c = (np.load(f"{name}.npy") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_table_of_contexts_gives_a_draw_a_row(here: Path) -> None:
    pl.DataFrame({"z": [0.1, 0.5, 0.9]}).write_csv("zs.csv")
    assert run("sample given --given zs.csv --out mock.csv") == 0
    assert pl.read_csv("mock.csv").height == 3


def test_check_leaves_a_report_and_overwrites_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in Path("given").rglob("*") if p.is_file()}
    for command in ("check given", "check given", "check given cat.csv --out mine"):
        assert run(command) == 0
    assert {p: p.read_bytes() for p in before} == before
    assert Path("given/check/report.html").exists() and Path("given/check-2/report.html").exists()
    assert "cat.csv" in Path("mine/report.html").read_text()
    assert capsys.readouterr().out.startswith("column")


def test_force_replaces(here: Path) -> None:
    assert run("sample run -n 5 --out cat.csv --force") == 0
    assert pl.read_csv("cat.csv").height == 5
    shutil.copy("given/held_out.parquet", "t.parquet")
    assert run("fit t.parquet --columns mag,size --arch gaussian --epochs 1 --validation 0 --out given --force") == 0
    assert fp.FlowDensity.load("given").schema_.names == ("mag", "size")
    assert not Path("given/held_out.parquet").exists()


def test_an_unfinished_run_is_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "fit cat.csv --columns mag,size --arch gaussian --out run --resume --epochs"
    assert run(f"{command} 3") == 0
    assert json.loads(Path("run/fit.json").read_text())["epochs"] == 3
    assert run(f"{command} 4 --seed 1") == 2
    assert "--seed was 0 and is now 1" in capsys.readouterr().err


def test_ctrl_c_leaves_a_run_that_can_be_used_and_resumed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = runs.Watch.__call__

    def stop(watch: runs.Watch, state: object) -> None:
        called(watch, state)
        if state.epoch == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runs.Watch, "__call__", stop)
    command = "fit cat.csv --columns mag,size --arch gaussian --epochs 5 --out new"
    assert run(command) == 130
    err = capsys.readouterr().err
    assert err.startswith("flowpath: interrupted after ") and len(err.splitlines()) == 1
    assert run("score new cat.csv --out s.csv") == 0
    monkeypatch.setattr(runs.Watch, "__call__", called)
    words = re.search(r"flowpath (fit .*)$", err)
    assert words is not None and run(words[1]) == 0
    assert json.loads(Path("new/fit.json").read_text())["epochs"] == 5


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGTERM is a POSIX signal")
def test_sigterm_leaves_best_weights_and_a_checkpoint(here: Path) -> None:
    words = "fit cat.csv --columns mag,size --arch maf --epochs 100000 --device cpu --out new"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flowpath", *words.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        for _ in range(1200):
            if Path("new/run.json").exists() or process.poll() is not None:
                break
            process_waits(process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert out.startswith("column")
    assert err.startswith("flowpath: interrupted after ") and "--resume" in err and len(err.splitlines()) == 1
    assert Path("new/checkpoint.safetensors").exists()
    assert run("sample new -n 5 --out mock.csv") == 0


def process_waits(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return


def write(name: str, text: str) -> Callable[[], object]:
    return lambda: Path(name).write_text(text)


def save(name: str, array: np.ndarray) -> Callable[[], object]:
    return lambda: np.save(name, array)


def edited(**columns: pl.Expr) -> Callable[[], object]:
    return lambda: catalogue().with_columns(**columns).write_csv("bad.csv")


def cut(path: str) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:500])


def foreign() -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, "run/flow.safetensors")


def at(row: int, name: str, value: float | None) -> pl.Expr:
    return pl.when(pl.int_range(ROWS) == row).then(value).otherwise(name)


def without_z() -> None:
    catalogue().drop("z").write_csv("bad.csv")


def wrong_lengths() -> None:
    pl.DataFrame({"z": [0.1, 0.5, 0.9]}).write_csv("zs.csv")


FIT = "fit cat.csv --columns mag,size --arch gaussian --epochs 1 --out new"
BAD = "fit bad.csv --columns mag,size --arch gaussian --epochs 1 --out new"
WITH = FIT + " --supports s.toml"

# id -> (the command, a word its one line must hold, what makes the mistake)
MISTAKES: dict[str, tuple[str, str, Callable[[], object] | None]] = {
    "no command": ("", "COMMAND", None),
    "unknown command": ("fitt cat.csv", "fitt", None),
    "unknown flag": (f"{FIT} --epoch-count 3", "--epoch-count", None),
    "no out": ("fit cat.csv", "--out", None),
    "file that is not there": ("fit nothing/at/all.csv --out new", "no folder", None),
    "near miss of a file": ("fit catt.csv --out new", "cat.csv", None),
    "folder as table": ("fit run --out new", "ends in", None),
    "unknown ending": ("fit cat.xlsx --out new", ".parquet", None),
    "empty csv": (BAD, "empty", write("bad.csv", "")),
    "header only": (BAD, "no rows", write("bad.csv", "mag,size\n")),
    "csv without names": (BAD, "names", write("bad.csv", "1,2\n3,4\n")),
    "name twice in the file": (BAD, "more than one column called 'mag'", write("bad.csv", "mag,mag\n1,2\n3,4\n")),
    "text as parquet": (BAD.replace("bad.csv", "bad.parquet"), "Parquet", write("bad.parquet", "mag,size\n1,2\n")),
    "text as npy": (
        BAD.replace("bad.csv", "bad.npy"),
        "does not begin as one does",
        write("bad.npy", "mag,size\n1,2\n"),
    ),
    "objects as npy": ("fit bad.npy --out new", "Python objects", save("bad.npy", np.array(["a", None]))),
    "npy of rank 3": ("fit bad.npy --out new", "(2, 3, 4)", save("bad.npy", np.zeros((2, 3, 4)))),
    "text column": ("fit cat.csv --arch gaussian --out new", "object", None),
    "near miss of a column": (FIT.replace("mag,size", "Mag,size"), "did you mean 'mag'?", None),
    "unknown context": (f"{FIT} --context redshift", "redshift", None),
    "unknown weights": (f"{FIT} --weights weight", "weight", None),
    "text as weights": (f"{FIT} --weights object", "holds no numbers", None),
    "text as context": (f"{FIT} --context object", "'object'", None),
    "column asked for twice": (FIT.replace("mag,size", "mag,mag"), "more than once", None),
    "column in two roles": (f"{FIT} --context mag", "more than once", None),
    "no column left": (FIT.replace("mag,size", ","), "no column", None),
    "constant column": (BAD, "constant", edited(mag=pl.lit(1.0))),
    "two columns the same": (BAD, "identical", edited(mag=pl.col("size"))),
    "one row": (BAD, "of 1 row none is left", write("bad.csv", "mag,size\n1,2\n")),
    "weights of zero sum": (f"{BAD} --weights w", "zero", edited(w=pl.lit(0.0))),
    "weight that is not finite": (
        f"{BAD} --weights w",
        "not finite in 1 row",
        edited(w=at(3, "w", None)),
    ),
    "missing value": (BAD, "--missing drop", edited(mag=at(7, "mag", None))),
    "infinite value": (BAD, "row 7 column 'mag' (inf)", edited(mag=at(7, "mag", np.inf))),
    "value outside its support": (BAD + " --supports s.toml", "row 7", edited(size=at(7, "size", -1.0))),
    "value on its bound": (BAD + " --supports s.toml", "--at-bound nudge", edited(size=at(7, "size", 0.0))),
    "bad TOML": (WITH, "s.toml", write("s.toml", "size = = 1")),
    "unknown support": (WITH, "positive", write("s.toml", 'size = "positif"')),
    "support of no column": (WITH, "did you mean 'size'?", write("s.toml", 'sise = "positive"')),
    "supports that are not there": (WITH.replace("s.toml", "none.toml"), "none.toml", None),
    "support as a number": (WITH, "size = 3", write("s.toml", "size = 3")),
    "unknown arch": (FIT.replace("gaussian", "nfs"), "did you mean 'nsf'?", None),
    "unknown device": (f"{FIT} --device gpu", "--device gpu", None),
    "device that is not here": (f"{FIT} --device cuda:99", "--device cuda:99", None),
    "share above 1": (f"{FIT} --test 1.5", "share", None),
    "shares that leave no row": (f"{FIT} --test 0.6 --validation 0.6", "hold out fewer", None),
    "seed below 0": (f"{FIT} --seed -1", "--seed", None),
    "epochs of 0": (f"{FIT} --epochs 0", "--epochs", None),
    "run that is there": (FIT.replace("new", "run"), "--force", None),
    "run that is a file": (FIT.replace("new", "cat.csv"), "cat.csv", None),
    "run in a file": (FIT.replace("new", "cat.csv/new"), "cat.csv", None),
    "force and resume": (f"{FIT} --force --resume", "--resume", None),
    "resume of nothing": (f"{FIT} --resume", "no checkpoint", None),
    "resume of other rows": (f"{BAD.replace('new', 'run')} --resume", "other rows", edited(mag=pl.col("mag") + 1)),
    "no run": ("sample rnu --out m.csv", "did you mean 'run'?", None),
    "truncated model": ("sample run --out m.csv", "cut short", cut("run/flow.safetensors")),
    "foreign safetensors": ("sample run --out m.csv", "not one that flowpath wrote", foreign),
    "flow without a table": (
        "sample run --out m.csv",
        "without a table",
        lambda: fp.save(fp.gaussian(2), "run/flow.safetensors"),
    ),
    "samples over a file": ("sample run --out cat.csv", "--force", None),
    "samples in a file": ("sample run --out cat.csv/m.csv", "not a folder", None),
    "samples as xlsx": ("sample run --out m.xlsx", ".parquet", None),
    "negative n": ("sample run -n -5 --out m.csv", "whole number above 0", None),
    "n that is no number": ("sample run -n many --out m.csv", "many", None),
    "given a column": ("sample given --given mag=1 --out m.csv", "not a context", None),
    "given what is not there": ("sample run --given z=1 --out m.csv", "no context", None),
    "given without a number": ("sample given --given z --out m.csv", "name=number", None),
    "given NaN": ("sample given --given z=nan --out m.csv", "z=nan", None),
    "given twice": ("sample given --given z=1 z=2 --out m.csv", "more than once", None),
    "given missing": ("sample given --out m.csv", "--given z=", None),
    "given another count": ("sample given -n 5 --given zs.csv --out m.csv", "3 rows", wrong_lengths),
    "score without a column": ("score run bad.csv --out s.csv", "mag", write("bad.csv", "Magn,size\n1,2\n")),
    "score without the context": ("score given bad.csv --out s.csv", "'z'", without_z),
    "bad id": ("score run cat.csv --id objects --out s.csv", "did you mean 'object'?", None),
    "id of text in npy": ("score run cat.csv --id object --out s.npy", "no numbers", None),
    "score of missing values": ("score run bad.csv --out s.csv", "--missing drop", edited(mag=at(3, "mag", None))),
    "score into a folder": ("score run cat.csv --out run/x.csv/", "folder", lambda: Path("run/x.csv").mkdir()),
    "check of rows outside": ("check given bad.csv", "outside the support", edited(size=-pl.col("size"))),
    "check over a report": ("check run --out given", "--force", None),
    "check of no rows": ("check run bad.csv", "no rows", write("bad.csv", "mag,size\n")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, word, make = MISTAKES[name]
    Path("s.toml").write_text('size = "positive"\n')
    if make is not None:
        make()
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert run(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("flowpath") and len(err.splitlines()) == 1, err
    assert word in err
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 40
