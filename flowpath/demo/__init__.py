"""The demonstration: a spline flow on a density that is known, and on a real table, judged on rows it never saw.

The table is scikit-learn's handwritten digits, 1797 pictures of 8 x 8 pixels with grey levels 0 to 16, made continuous
by uniform noise on [0, 1), so that a density bounds the log probability of the pictures from below ("A note on the
evaluation of generative models", Theis, van den Oord, Bethge 2015, arXiv:1511.01844). Why this table: a fit can be
judged on it, see experiments/README.md.

The third part hands a Pyro model to `fp.svi.fit_posterior`: eight schools, see flowpath/demo/schools.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from flowpath import plot, report, tables
from flowpath.demo import schools
from flowpath.demo.folded import Folded
from flowpath.demo.rivals import FLOW, GAUSSIAN, MIXTURE, TRUTH, Kind, Mixture, Scores, choose_mixture, conclusion
from flowpath.density import FlowDensity
from flowpath.scope import versions
from flowpath.svi.fitting import fit_posterior
from flowpath.training.loop import State

_SAMPLES = 1000
SHARES = {"validation": 0.08, "test": 0.2}  # of the table's rows
_TO_CHOOSE = 8000  # training rows on which the kinds of mixture compete


@dataclass(frozen=True)
class Effort:
    """What goes into one comparison.

    Attributes:
        settings: of `FlowDensity`.
        mixtures: the kinds that compete on validation rows to be the flow's rival.
    """

    settings: dict[str, Any]
    mixtures: tuple[Kind, ...]

    def quick(self) -> Effort:
        """Two epochs and two kinds: shows the steps."""
        return Effort({**self.settings, "epochs": 2}, self.mixtures[:2])


DRAWS = 20_000
SCHOOLS = 1200  # gradient steps at most
KNOWN = Effort(
    {"epochs": 30, "batch_size": 256, "learning_rate": 2e-3, "transforms": 6, "hidden_features": (48, 48)},
    tuple(("full", k, 1e-3) for k in (10, 20, 40)),
)
TABLE = Effort(
    {
        "epochs": 60,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "transforms": 5,
        "hidden_features": (128, 128),
        "dropout": 0.3,
    },
    (
        *(("full", k, floor) for k in (2, 5, 10, 20) for floor in (1e-3, 1e-2, 1e-1)),
        *(("diag", k, floor) for k in (20, 40, 80, 160) for floor in (1e-3, 1e-2)),
    ),
)


def main(out: str | os.PathLike[str], *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Fit three flows, print how they do, and leave what they gave in a folder.

    Args:
        out: the folder, made where it is missing: of the table a run as `flowpath fit` leaves it (flow.safetensors,
            history.csv, report.html, ...), samples.csv and scores.csv of the rows held out; the posterior of the eight
            schools in schools/; summary.json, and figures.
        seed: of draws, splits, fits and samples.
        quick: seconds of training instead of minutes; shows the steps, proves nothing.

    Returns:
        What summary.json holds.
    """
    folder, start = Path(out), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        known, first = _known_density(folder, seed, quick)
        table, second = _real_table(folder, seed, quick)
        effects = _eight_schools(folder, seed, quick)
    histories = {"known density": first.result_.history, "handwritten digits": second.result_.history}
    plot.history(histories).savefig(folder / "histories.png")
    seconds = round(time.perf_counter() - start, 1)
    summary = {
        "known density": known,
        "handwritten digits": table,
        "eight schools": effects,
        "seed": seed,
        "quick": quick,
        "seconds": seconds,
        "versions": versions(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    left = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    print(f"\n{folder} holds {left}; {seconds:.0f} s in all")
    if quick:
        print("this was --quick: the numbers show the steps and prove nothing")
    return summary


def _known_density(folder: Path, seed: int, quick: bool) -> tuple[dict[str, Any], FlowDensity]:
    """Part (a): the true log density is at hand, so the mean difference on fresh draws is KL(p | q)."""
    generator = torch.Generator().manual_seed(seed)
    draws, effort = (DRAWS // 20, KNOWN.quick()) if quick else (DRAWS, KNOWN)
    x, fresh = Folded.draw(draws, generator), Folded.draw(draws, generator)
    print(f"1. A known density: {len(x)} draws of 5 features with two modes, folds and a funnel", flush=True)
    model = density(effort, seed, validation=0.1).fit(pl.DataFrame(x.numpy()))
    scores = compare(model, x, fresh, effort, seed)
    scores = Scores({**scores.of, TRUTH: Folded.log_prob(fresh)}, scores.kind)
    plot.log_densities(scores.of[TRUTH], scores.of[FLOW]).savefig(folder / "known_log_density.png")
    plot.pairs(fresh, model.sample(len(x)).to_torch()).savefig(folder / "known_pairs.png")
    print(f"   mean log density of {len(fresh)} fresh draws, and KL from the truth, in nats:")
    return {"rows": len(x), "fresh rows": len(fresh), **_told(scores, TRUTH, model)}, model


def _real_table(folder: Path, seed: int, quick: bool) -> tuple[dict[str, Any], FlowDensity]:
    """Part (b): the flow beside its rivals on rows that no fit has seen."""
    x, names = digits(seed)
    print(f"\n2. Handwritten digits of scikit-learn: {len(x)} pictures of {x.shape[1]} pixels, dequantised", flush=True)
    effort = TABLE.quick() if quick else TABLE
    table = pl.DataFrame(x.numpy(), schema=names)
    model = density(effort, seed, **SHARES).fit(table)
    rows = model.rows_["test"]
    scores = compare(model, x, x[rows], effort, seed)
    print(f"   mean log density of {len(rows)} rows that no fit has seen, and how far the flow is ahead, in nats:")
    counts = {"rows": len(model.rows_["train"]), "validation rows": len(model.rows_["validation"])}
    told = {**counts, "held-out rows": len(rows), **_told(scores, FLOW, model)}
    _leave(folder, model, table, scores.of[FLOW], seed)
    return told, model


def _eight_schools(folder: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Part (c): a Pyro model in, a posterior out."""
    errors, effects = schools.data()
    print("\n3. Eight schools: the posterior of a Pyro model, whose density has no mode", flush=True)
    steps = SCHOOLS // 20 if quick else SCHOOLS
    posterior = fit_posterior(schools.model, errors, effects, max_steps=steps, seed=seed, progress=False)
    print("   " + str(posterior).replace("\n", "\n   "))
    schools.figure(posterior).savefig(folder / "eight_schools.png")
    posterior.save(folder / "schools")
    means = {name: columns["mean"].tolist() for name, columns in posterior.summary().items()}
    numbers = {"log evidence": posterior.log_evidence, "ELBO": posterior.elbo, "k-hat": posterior.khat}
    return {"verdict": posterior.verdict(), **numbers, "steps": posterior.steps, "means": means}


def _told(scores: Scores, reference: str, model: FlowDensity) -> dict[str, Any]:
    """Print how the scores compare; returns the same as JSON values."""
    words = conclusion(scores)
    print(f"{scores.table(reference)}\n   {words}", flush=True)
    return {**scores.report(reference), "conclusion": words, "fit seconds": round(model.result_.seconds, 1)}


def _leave(folder: Path, model: FlowDensity, table: pl.DataFrame, scores: Tensor, seed: int) -> None:
    """The run as `flowpath fit` leaves one, samples, the scores of the held-out rows, and the report on them."""
    rows = model.rows_["test"]
    held, samples = table[rows.tolist()], model.sample(_SAMPLES)
    model.fit_options = None  # the line an epoch is no setting to keep
    model.save(folder)
    tables.write(held, folder / "held_out.parquet", overwrite=True)
    tables.write(samples.with_columns(pl.all().round(4)), folder / "samples.csv", overwrite=True)
    scored = pl.DataFrame({"row": rows, "log_prob": scores.numpy()})
    tables.write(scored, folder / "scores.csv", overwrite=True)
    plot.images(held.to_torch(), samples.to_torch(), (8, 8)).savefig(folder / "digits.png")
    judged = report.judge(model, held, seed=seed)
    path = judged.write(folder, f"Handwritten digits: {len(rows)} rows that the fit did not see")
    print(f"   {judged.report.verdict}\n   report: {path}")


def digits(seed: int) -> tuple[Tensor, list[str]]:
    """The table `(1797, 64)` in float64, dequantised by uniform noise, and the names of its columns."""
    from sklearn.datasets import load_digits

    held = load_digits()
    grey = torch.from_numpy(held.data)
    noise = torch.rand(grey.shape, generator=torch.Generator().manual_seed(seed), dtype=grey.dtype)
    return grey + noise, list(held.feature_names)


def compare(model: FlowDensity, x: Tensor, test: Tensor, effort: Effort, seed: int) -> Scores:
    """Log densities of the test rows under a fitted flow, the best mixture and the full Gaussian.

    The rivals are fitted to the flow's training rows and chosen by its validation rows; once chosen, they are fitted to
    both, and the flow is not.

    Args:
        model: fitted to a DataFrame, as the effort says.
        x: its rows `(N, d)`.
        test: rows `(M, d)` that it has not seen.
    """
    train, validation = (x[model.rows_[name]] for name in ("train", "validation"))
    kind = choose_mixture(train[:_TO_CHOOSE], validation, effort.mixtures, seed)
    print(f"   mixture: {kind[1]} components ({kind[0]}), the best of {len(effort.mixtures)} kinds on validation rows")
    rows = torch.cat([train, validation])
    rivals = {MIXTURE: Mixture.fit(rows, kind, seed), GAUSSIAN: Mixture.fit(rows, ("full", 1, 1e-6), seed)}
    of = {name: rival.log_prob(test) for name, rival in rivals.items()}
    scores = model.score_samples(pl.DataFrame(test.numpy(), schema=list(model.schema_.names)))
    return Scores({FLOW: torch.from_numpy(scores), **of}, kind)


def density(effort: Effort, seed: int, *, validation: float, test: float | None = None) -> FlowDensity:
    """A neural spline flow for a table, with a line every tenth epoch; validation and test are shares of the rows."""
    model = FlowDensity(regularise=False, compile=False, validation=validation, test=test, random_state=seed)
    return model.set_params(**effort.settings, fit_options={"progress": False, "callbacks": _say})


@contextmanager
def _one_thread() -> Iterator[None]:
    """Nets this small gain nothing from a second thread, and lose much where other work holds its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _say(state: State) -> None:
    if state.epoch == 1 or state.epoch % 10 == 0:
        print(
            f"   epoch {state.epoch:3d}: log density {state.train:8.3f} on training rows, {state.validation:8.3f} on "
            f"validation rows, {state.seconds:4.0f} s",
            flush=True,
        )
