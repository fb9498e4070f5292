"""What a fit returns."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowpath import io
from flowpath.flow import Flow


@dataclass
class FitResult:
    """A fitted flow and how it came about. Scores are mean log densities in nats, in the units of the data.

    Attributes:
        flow: in eval mode, with the best weights, on the device it came from.
        history: one row an epoch: epoch, step, train, validation, validation_se, learning_rate, grad_norm, skipped,
            seconds.
        best_epoch: whose weights these are; 0 where there was no validation and they are the last ones.
        validation_log_prob, validation_se: on the validation rows, which chose the weights; None without.
        test_log_prob, test_se: on the test rows, which nothing was chosen on; None without.
        stop_reason: why training ended.
        epochs, steps, skipped: how many epochs and steps were done, and batches skipped as not finite.
        notes: what else there is to know, such as where numbers that are not finite came from.
        rows: how many rows went to train, validation and test.
        seconds, seed, device, compiled, versions, settings: as they were.
    """

    flow: Flow = field(repr=False)
    history: list[dict[str, float]] = field(repr=False)
    best_epoch: int
    stop_reason: str
    epochs: int
    steps: int
    skipped: int
    seconds: float
    validation_log_prob: float | None = None
    validation_se: float | None = None
    test_log_prob: float | None = None
    test_se: float | None = None
    notes: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    seed: int | None = None
    device: str = "cpu"
    compiled: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"FitResult({self.scores()}, epochs={self.epochs}, {self.stop_reason}, {self.seconds:.1f} s)"

    def scores(self) -> str:
        """The held-out scores in words."""
        found = [
            f"{name} {_with_error(value, error)}"
            for name, value, error in (
                ("test", self.test_log_prob, self.test_se),
                ("validation", self.validation_log_prob, self.validation_se),
            )
            if value is not None
        ]
        return ", ".join(found) + " nats" if found else "no held-out score"

    def summary(self) -> str:
        """The result in a few lines."""
        chosen = "no rows were held out" if self.validation_log_prob is None else f"best of epoch {self.best_epoch}"
        lines = [
            f"{self.scores()} a row ({chosen})",
            f"{self.epochs} epochs, {self.steps} steps in {self.seconds:.1f} s on {self.device}"
            f"{', compiled' if self.compiled else ''}; ended: {self.stop_reason}",
            "rows: " + (", ".join(f"{n} {name}" for name, n in self.rows.items()) or "a stream"),
        ]
        if self.validation_log_prob is not None and self.test_log_prob is None:
            lines.append("the validation rows chose the weights, so their score is a little too good; see test=")
        if self.skipped:
            lines.append(f"{self.skipped} batches were not finite and were skipped:")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def training(self) -> dict[str, Any]:
        """All but flow and history, as JSON values: the training summary that is saved with the flow."""
        held = {k: v for k, v in vars(self).items() if k not in ("flow", "history")}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in held.items()}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write flow.safetensors, history.csv and fit.json into a folder, which `fp.load` then reads; returns it.

        Raises:
            TypeError: a part of the flow is not registered.
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        io.save(self.flow, folder / "flow.safetensors", training=self.training())
        (folder / "fit.json").write_text(json.dumps(self.training(), indent=2) + "\n", encoding="utf-8")
        with open(folder / "history.csv", "w", newline="", encoding="utf-8") as file:
            names = list(self.history[0]) if self.history else []
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.history)
        return folder


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" + ("" if error is None or not math.isfinite(error) else f" ± {error:.3f}")
