"""What `flowpath fit | sample | score | check` do: tables in, a run folder, tables and a report out.

A run folder holds flow.safetensors and table.json (the estimator), history.csv and fit.json (how it came about),
held_out.parquet (rows the weights were not fitted to), report.html and its figures.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowpath import plot, report, tables
from flowpath.density import FlowDensity
from flowpath.diagnostics import Report, check

if TYPE_CHECKING:
    import polars as pl

_DRAWS = 5000


def fit(args: Namespace) -> None:
    """Fit a table and leave a run folder; the column table is printed first."""
    run = Path(args.out)
    _refuse_existing(run / "flow.safetensors", args.force or args.resume)
    wanted = _names(args.columns)
    context, weight = _names(args.context) or [], args.weights
    table = tables.read(args.table)
    names = wanted or [c for c in table.columns if c not in (*context, weight)]
    _check_roles(names, context, weight)
    frame = tables.pick(table, names, "fit")
    supports = _supports(args.supports)
    print(tables.describe(frame, supports), flush=True)
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.safetensors"
    if args.force and not args.resume:
        checkpoint.unlink(missing_ok=True)
    if args.resume and not checkpoint.exists():
        raise FileNotFoundError(f"--resume: there is no checkpoint in {run}; leave --resume out to begin anew")
    model = FlowDensity(
        supports,
        args.arch,
        missing=args.missing,
        at_bound=args.at_bound,
        validation=args.validation,
        test=args.test,
        epochs=args.epochs,
        time_limit=args.time_limit,
        device=args.device,
        random_state=args.seed,
        fit_options={"checkpoint": run, "resume": run if args.resume else None},
    )
    weights = None if weight is None else tables.pick(table, [weight], "fit").to_numpy()[:, 0]
    model.fit(frame, sample_weight=weights, context=tables.pick(table, context, "fit") if context else None)
    if model.result_.stop_reason == "interrupted":
        print(f"interrupted: go on with the same command and --resume; the best weights so far are in {run}")
    model.save(run)
    held = "test" if "test" in model.rows_ and len(model.rows_["test"]) else "validation"
    rows = table[[*names, *context, *([weight] if weight else [])]][model.rows_[held].tolist()]
    tables.write(rows, run / "held_out.parquet", overwrite=True)
    _note(run, held, weight)
    print(model.result_.summary())
    print("\n".join(model.notes_))
    _judge(model, rows, context, weight, held, run, args.seed)


def sample(args: Namespace) -> None:
    """Draw rows from a run into a table."""
    model = _load(args.run)
    _refuse_existing(Path(args.out), args.force)
    drawn = model.sample(args.n, context=_given(args.given, model), random_state=args.seed)
    path = tables.write(drawn, args.out, overwrite=args.force)
    print(f"{args.n} rows written to {path}")


def score(args: Namespace) -> None:
    """Score each row of a table, in its order."""
    import polars as pl

    model = _load(args.run)
    _refuse_existing(Path(args.out), args.force)
    table = tables.read(args.table)
    names = model.context_names_
    context = tables.pick(table, list(names), "score") if names else None
    values = model.score_samples(tables.pick(table, model.schema_.names, "score"), context)
    ids = tables.pick(table, [args.id], "score") if args.id else pl.DataFrame({"row": np.arange(len(table))})
    path = tables.write(ids.with_columns(pl.Series("log_prob", values)), args.out, overwrite=args.force)
    outside = int(np.isneginf(values).sum())
    print(
        f"{len(values)} rows scored into {path}: mean {np.nanmean(values):.4f} nats"
        if not outside
        else (f"{len(values)} rows scored into {path}: {outside} of them lie outside the supports and score -inf")
    )


def check_run(args: Namespace) -> None:
    """Judge a run on a table, or on the rows it held out, and write its report."""
    model, run = _load(args.run), Path(args.run)
    note = _noted(run)
    rows = tables.read(args.table or run / "held_out.parquet")
    held = "given" if args.table else note.get("held_out", "test")
    weight = note.get("weights")
    _judge(model, rows, list(model.context_names_ or ()), weight, held, run, args.seed)


def _judge(
    model: FlowDensity,
    rows: pl.DataFrame,
    context: Sequence[str],
    weight: str | None,
    held: str,
    run: Path,
    seed: int,
) -> Report:
    cells = model.to_cells(tables.pick(rows, model.schema_.names, "check"))
    given = tables.pick(rows, list(context), "check").to_numpy() if context else None
    w = tables.pick(rows, [weight], "check").to_numpy()[:, 0] if weight in rows.columns else None
    where = {"validation": "early-stopping"}.get(held, "held out")
    found = check(model.flow_, cells, given, w, rows=where, seed=seed)
    print(found)
    drawn = model.sample(min(len(rows), _DRAWS), context=None if given is None else given[:_DRAWS], random_state=seed)
    names = model.schema_.names
    data, samples = (tables.pick(t, names, "check").to_numpy().astype(float) for t in (rows, drawn))
    figures = {
        "Rows (grey) and samples (red)": plot.pairs(data[:_DRAWS], samples, names),
        "Score by epoch": plot.history({"fit": model.result_.history}),
    }
    for file, figure in zip(("pairs.png", "history.png"), figures.values(), strict=True):
        figure.savefig(run / file, dpi=110, bbox_inches="tight")
    columns = [
        vars(c)
        for c in tables.columns(tables.pick(rows, names, "check"), dict(zip(names, model.supports_, strict=True)))
    ]
    settings = {"rows": model.counts_, "units": "nats", **model.result_.training()}
    path = report.write(run / "report.html", f"flowpath: {run.name}", found, figures, {"Columns": columns}, settings)
    print(f"report: {path}")
    return found


def _names(words: str | None) -> list[str] | None:
    return None if words is None else [w.strip() for w in words.split(",") if w.strip()]


def _check_roles(names: Sequence[str], context: Sequence[str], weight: str | None) -> None:
    if not names:
        raise ValueError("fit: no column is left to fit; name some with --columns")
    roles = [*names, *context, *([weight] if weight else [])]
    twice = sorted({n for n in roles if roles.count(n) > 1})
    if twice:
        raise ValueError(f"fit: {', '.join(twice)} named more than once among --columns, --context and --weights")


def _supports(path: str | None) -> Mapping[str, Any] | None:
    from flowpath.supports import read_supports

    return None if path is None else read_supports(path)


def _given(words: Sequence[str] | None, model: FlowDensity) -> dict[str, float] | None:
    """`z=0.5` words as a mapping; every context column, and nothing else."""
    found: dict[str, float] = {}
    for word in words or ():
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"--given expects name=number, got {word!r}") from None
    context = list(model.context_names_ or ())
    for name in found:
        if name in model.schema_.names:
            raise ValueError(f"--given: {name} is a column of this density, not a context; fit with --context {name}")
        if name not in context:
            raise ValueError(f"--given: this run has no context {name!r}; it has {', '.join(context) or 'none'}")
    absent = [name for name in context if name not in found]
    if absent:
        raise ValueError(f"sample: this run needs --given {' '.join(f'{n}=...' for n in absent)}")
    return found or None


def _load(run: str) -> FlowDensity:
    folder = Path(run)
    if not (folder / "flow.safetensors").exists():
        raise FileNotFoundError(f"{run} is no run folder: it holds no flow.safetensors; make one with flowpath fit")
    return FlowDensity.load(folder)


def _note(run: Path, held: str, weight: str | None) -> None:
    (run / "run.json").write_text(json.dumps({"held_out": held, "weights": weight}) + os.linesep, encoding="utf-8")


def _noted(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _refuse_existing(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists and stays as it is; pass --force to replace it, or another --out")
