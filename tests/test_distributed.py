"""Fits in two processes under torchrun: the one-process result, decisions taken together, nobody left waiting."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import flowpath as fp
from flowpath.training.team import Team, together

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    os.name == "nt" or not (distributed.is_available() and distributed.is_gloo_available()),
    reason="two processes talk through gloo, which this build of torch has not, or need POSIX signals",
)

# What both the processes and the test run: name -> a fit. Batches of 33 rows cannot be halved.
FITS = '''
import torch
from torch import nn
from torch.distributions import biject_to, constraints
import flowpath as fp

x = 10 + 3 * torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(-1)
w = torch.linspace(0, 3, 200, dtype=torch.float64)

class Spare(fp.Flow):
    """A flow with a parameter that has no part in the density."""

    def __init__(self):
        flow = fp.gaussian(2)
        super().__init__(flow.transform, flow.base)
        self.spare = nn.Parameter(torch.zeros(1))

def small(dtype):
    torch.manual_seed(1)
    layers = [fp.Whiten(2), fp.ActNorm(2), *fp.nsf(2, transforms=2, hidden_features=(8,), bins=4).transform.transforms]
    return fp.Flow(fp.Chain(layers), fp.StandardNormal(2)).to(dtype)

def positive():
    layer = fp.from_torch(biject_to(constraints.positive))
    return fp.Flow(fp.Chain([layer, fp.TriangularAffine(2)]), fp.StandardNormal(2))

def run(flow, rows=x, **options):
    options = dict(seed=0, epochs=3, batch_size=33, patience=None, device="cpu", progress=False) | options
    return fp.fit(flow, rows, **options)

outside = x.abs()
outside[7, 1] = -1.0
'''

WORK = """
import os, sys
from pathlib import Path

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
found = {}

def keep(name, result, **more):
    found[name] = {"weights": result.flow.state_dict(), "history": result.history, "why": result.stop_reason,
                   "steps": result.steps, "notes": result.notes, "test": result.test_log_prob, **more}

def refusal(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

for dtype in (torch.float64, torch.float32):
    keep(f"weighted {dtype}", run(small(dtype), weights=w, test=0.1))
calls = []
def stop(state):
    calls.append(state.epoch)
    state.stop = state.epoch == 2
keep("stopped", run("gaussian", callbacks=stop), calls=calls)
before = torch.initial_seed(), torch.randint(2**40, ()).item()
keep("no seed", run(fp.nsf(2, transforms=1, hidden_features=(4 + 4,)), seed=None))
found["global seed kept"] = before[0] == torch.initial_seed()
keep("spare", run(Spare()))
keep("timed", run("gaussian", epochs=None, time_limit=0.2))
keep("dropout", run("realnvp", transforms=2, hidden_features=(8,), dropout=0.2))
keep("skipped", run(positive(), outside, validation=None))

def fail(state):
    if state.epoch == 2:
        raise KeyError("a callback of rank 0")
found["callback"] = refusal(lambda: run(small(torch.float64), callbacks=fail, checkpoint=folder / "cut"))
keep("resumed", run(small(torch.float64), checkpoint=folder / "cut", resume=folder / "cut"))
found["stream"] = refusal(lambda: run("gaussian", iter([x, x]), steps=2))
found["narrow"] = refusal(lambda: run("gaussian", batch_size=1))
found["rows"] = refusal(lambda: run("gaussian", x + rank))
found["limits"] = refusal(lambda: run("gaussian", epochs=3 + rank))
found["checkpoint"] = refusal(lambda: run("gaussian", checkpoint=folder / "not.safetensors"))
found["group left"] = torch.distributed.is_initialized()
torch.save(found, folder / f"found-{rank}.pt")
"""

# One rank is told to end: by SIGTERM, or by SIGKILL, which leaves it no word to say.
KILLED = """
import os, signal, sys
from pathlib import Path

def tell(state):
    print("go", flush=True)
run("gaussian", epochs=100_000, checkpoint=sys.argv[1], callbacks=tell)
"""


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **more}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    """The fits of FITS in this process."""
    held: dict[str, Any] = {}
    exec(FITS, held)
    return held


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What two processes under torchrun found, by rank."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "work.py"
    script.write_text(FITS + WORK)
    (folder / "not.safetensors").write_text("something else")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*words, str(script), str(folder)], env=environment(), capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    yield [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in (0, 1)]


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two states."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_two_processes_reach_the_result_of_one(dtype: torch.dtype, found: Any, here: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        alone = here["run"](here["small"](dtype), weights=here["w"], test=0.1)
    both = found[0][f"weighted {dtype}"]
    limit = 1e-5 if dtype == torch.float32 else 1e-10
    assert apart(alone.flow.state_dict(), both["weights"]) < limit
    assert both["test"] == pytest.approx(alone.test_log_prob, abs=limit)
    for row, other in zip(alone.history, both["history"], strict=True):
        assert [row[k] for k in ("train", "validation", "validation_se", "grad_norm")] == pytest.approx(
            [other[k] for k in ("train", "validation", "validation_se", "grad_norm")], rel=1e-5
        )


@pytest.mark.parametrize("name", ["weighted torch.float32", "stopped", "no seed", "spare", "timed", "dropout"])
def test_processes_end_with_the_same_weights_and_history(name: str, found: Any) -> None:
    first, second = (f[name] for f in found)
    assert apart(first["weights"], second["weights"]) == 0.0
    assert repr(first["history"]) == repr(second["history"])
    assert first["why"] == second["why"]


def test_callbacks_of_rank_0_end_the_fit_of_all(found: Any) -> None:
    assert [f["stopped"]["why"] for f in found] == ["stopped by a callback"] * 2
    assert [f["stopped"]["calls"] for f in found] == [[1, 2], []]


def test_batches_are_skipped_together_and_explained_by_the_process_that_has_the_row(found: Any, here: Any) -> None:
    alone = here["run"](here["positive"](), here["outside"], validation=None)
    first, second = (f["skipped"] for f in found)
    assert [row["skipped"] for row in first["history"]] == [row["skipped"] for row in alone.history]
    assert alone.skipped > 0
    assert apart(alone.flow.state_dict(), first["weights"]) < 1e-5
    assert first["notes"] == second["notes"]
    assert all("1 of 1" in note and "rows, first at the layer" in note for note in first["notes"])


def test_error_in_a_callback_is_raised_everywhere(found: Any) -> None:
    assert [f["callback"] for f in found] == ["KeyError: 'a callback of rank 0'"] * 2


def test_resumed_fit_ends_like_one_never_stopped(found: Any, here: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        whole = here["run"](here["small"](torch.float64))
    for f in found:
        assert apart(whole.flow.state_dict(), f["resumed"]["weights"]) < 1e-10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stream", "a stream cannot be split over 2 processes"),
        ("narrow", "batches of 1 rows cannot be split"),
        ("rows", "process 1 was called with another fingerprint than process 0"),
        ("limits", "process 1 was called with another epochs than process 0"),
        ("checkpoint", "FileExistsError"),
    ],
)
def test_what_cannot_be_done_together_is_refused_by_all(name: str, message: str, found: Any) -> None:
    for f in found:
        assert message in f[name]


def test_nothing_is_left_behind(found: Any) -> None:
    for f in found:
        assert not f["group left"]
        assert f["global seed kept"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_when_one_process_is_told_to_end_all_do(number: signal.Signals, tmp_path: Path) -> None:
    script, folder = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(FITS + KILLED)
    port = free_port()
    team = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        assert team[0].stdout is not None
        assert team[0].stdout.readline() == "go\n"
        team[1].send_signal(number)
        for process in team:
            process.communicate(timeout=60)
    finally:
        for process in team:
            process.kill()
    assert team[1].returncode == -number
    if number == signal.SIGTERM:
        assert team[0].returncode == -number
        assert (folder / "checkpoint.safetensors").exists()
    else:
        assert team[0].returncode != 0


def test_one_process_is_a_team_of_one() -> None:
    with together(torch.device("cpu")) as team:
        assert team == Team()
        assert team.part(7) == slice(0, 7)
        assert not distributed.is_initialized()


def test_processes_that_torchrun_did_not_start_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but RANK, .* start the processes with torchrun"):
        fp.fit("gaussian", torch.randn(50, 2), seed=0)
