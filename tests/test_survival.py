"""Fits that are killed: real processes, SIGKILL at random moments, the same weights in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
KILLS = 20

FIT = """
import os, sys, time
from pathlib import Path
import torch
import flowpath as fp
from flowpath.io import storage

folder, slow = Path(sys.argv[1]), sys.argv[2] == "slow"
torch.set_num_threads(1)
if slow:  # most of the time is spent inside the writing of a checkpoint
    flush = storage._flush
    storage._flush = lambda path: (time.sleep(0.1), flush(path))
x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).cumsum(-1)
there = folder / "checkpoint.safetensors"
told = []
def tell(state):
    if not told:
        told.append(print("go", flush=True))
result = fp.fit(
    "realnvp", x, seed=0, epochs=200, patience=None, batch_size=32, transforms=2, hidden_features=(8,), dropout=0.1,
    compile=False, progress=False, callbacks=tell, checkpoint=folder, resume=folder if there.exists() else None,
)
result.save(folder / "done")
print("done", flush=True)
"""


def start(script: Path, folder: Path, pace: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), pace], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    return process


def finish(script: Path, folder: Path) -> None:
    with start(script, folder, "quick") as process:
        assert process.communicate(timeout=300)[0] == "done\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
def test_a_fit_killed_twenty_times_ends_with_the_weights_of_one_never_killed(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(FIT)
    finish(script, tmp_path / "whole")
    chance, kills, resumed = random.Random(0), 0, 0
    while kills < KILLS and not (tmp_path / "killed" / "done").exists():
        resumed += (tmp_path / "killed" / "checkpoint.safetensors").exists()
        with start(script, tmp_path / "killed", "slow" if kills % 2 else "quick") as process:
            time.sleep(chance.uniform(0.0, 0.4))
            process.send_signal(signal.SIGKILL)
            kills += process.wait(timeout=60) == -signal.SIGKILL
    if not (tmp_path / "killed" / "done").exists():
        finish(script, tmp_path / "killed")
    assert resumed >= 5
    whole, killed = (load_file(tmp_path / name / "done" / "flow.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        assert torch.equal(value, killed[name]), name
