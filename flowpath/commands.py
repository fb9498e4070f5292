"""What `flowpath fit | sample | score | check` do: tables in, a run folder, tables and a report out."""

from __future__ import annotations

import json
import re
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowpath import report, runs, tables
from flowpath.cli import Interrupted
from flowpath.density import FlowDensity
from flowpath.scope import leads
from flowpath.supports import Support, read_supports
from flowpath.training.rows import plural

if TYPE_CHECKING:
    import polars as pl


_SAME = ("columns", "context", "weights", "arch", "seed", "validation", "test", "missing", "at_bound")  # to resume
_ROWS = 1000


def fit(args: Namespace) -> None:
    """Fit a table and leave a run folder; the column table is printed first."""
    run = Path(args.out)
    runs.check_free(run, args)
    runs.usable_device(args.device)
    table = tables.read(args.table)
    names, context, weight = _roles(args, table)
    frame = tables.pick(table, names, "fit")
    supports = None if args.supports is None else _of_columns(read_supports(args.supports), names, table.columns)
    if leads():
        _tell_columns(frame, supports, context, weight)
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
    )
    given = tables.pick(table, context, "fit") if context else None
    weights = None if weight is None else _weights(table, weight)
    watch = runs.Watch(run, {**{name: getattr(args, name) for name in _SAME}, "supports": _words(model.supports)})
    resume = run if args.resume else None
    model.fit_options = {"checkpoint": run, "resume": resume, "progress": "auto", "callbacks": watch}
    if resume is not None:
        runs.check_resumed(run, watch.asked)
    elif args.force and leads():
        (run / runs.CHECKPOINT).unlink(missing_ok=True)
    with watch.listening():
        with runs.same_rows(run):
            model.fit(frame, sample_weight=weights, context=given)
        if not leads():  # rank 0 writes
            return
        model.fit_options = None
        model.save(run)
        held, rows = _held_out(model, table[[*names, *context, *([weight] if weight else [])]])
        watch.note(held_out=held)
        (run / runs.HELD).unlink(missing_ok=True)
        if held != "train":
            tables.write(rows, run / runs.HELD)
    if model.result_.stop_reason == "interrupted":
        raise Interrupted(watch.number, _how_to_resume(args, model))
    print(_summary(model), flush=True)
    _judge(model, rows, weight, held, run, args)


def sample(args: Namespace) -> None:
    """Draw rows from a run into a table."""
    model = runs.load(args.run, args.device)
    out = runs.free_file(args.out, args.force)
    given = _given(args.given or [], model)
    each = 1 if given is None or isinstance(given, dict) else len(given)
    count = args.n or (each if each > 1 else _ROWS)
    drawn = model.sample(count, context=given, random_state=args.seed)
    print(tables.describe(drawn, list(model.supports_)))
    tables.write(drawn, out, overwrite=args.force)
    print(f"{count} rows written to {out}")


def score(args: Namespace) -> None:
    """Score each row of a table, in its order."""
    import polars as pl

    model = runs.load(args.run, args.device)
    out = runs.free_file(args.out, args.force)
    model.missing = args.missing or model.missing
    table = tables.read(args.table)
    ids = tables.pick(table, [args.id], "--id") if args.id else pl.DataFrame({"row": np.arange(len(table))})
    if args.id == "log_prob":
        raise ValueError("--id: a column called 'log_prob' is what is written beside it; rename yours")
    frame, context = _known(model, table, "score")
    print(tables.describe(frame, list(model.supports_)), flush=True)
    values = model.score_samples(frame, context)
    tables.write(ids.with_columns(pl.Series("log_prob", values)), out, overwrite=args.force)
    inside = values[np.isfinite(values)]
    said = [f"{len(values)} rows scored into {out}"]
    said += [f"mean {inside.mean():.4f} nats{_over(len(inside), len(values))}"] if len(inside) else []
    for count, why in ((np.isneginf(values), "outside the supports: -inf"), (np.isnan(values), "missing a value: NaN")):
        said += [f"{count.sum()} {why}"] if count.any() else []
    print("; ".join(said))


def check_run(args: Namespace) -> None:
    """Judge a run on a table, or on the rows it held out, and write its report."""
    model, run = runs.load(args.run, args.device), runs.folder_of(args.run)
    out = runs.free_folder(run, args.out, args.force)
    note = runs.noted(run)
    if args.table is None and not (run / runs.HELD).exists():
        raise FileNotFoundError(f"check: {run} held no rows out; name a table that the fit did not see")
    rows = tables.read(args.table or run / runs.HELD)
    frame, context = _known(model, rows, "check")
    print(tables.describe(frame, list(model.supports_)), flush=True)
    rows = _complete(rows, frame, context, args.missing or model.missing)
    weight = note.get("asked", {}).get("weights")
    if weight is not None and weight not in rows.columns:
        print(f"no column {weight!r} of weights here: every row counts the same")
    _judge(model, rows, weight, "given" if args.table else note.get("held_out", "test"), out, args)


def _judge(model: FlowDensity, rows: pl.DataFrame, weight: str | None, held: str, out: Path, args: Namespace) -> None:
    """Print the verdict on rows, and leave it with its figures in a folder."""
    frame, context = _known(model, rows, "check")
    weights = _weights(rows, weight) if weight in rows.columns else None
    judged = report.judge(model, frame, context, weights, held=held, seed=args.seed)
    print(judged.report)
    run = runs.folder_of(args.run).resolve().name if "run" in args else out.resolve().name
    path = judged.write(out, f"{run}: {Path(args.table or runs.HELD).name}")
    print(f"report: {path}")


def _roles(args: Namespace, table: pl.DataFrame) -> tuple[list[str], list[str], str | None]:
    """The columns to fit, those of the context, and that of the weights; each has one role."""
    wanted, context, weight = _names(args.columns), _names(args.context) or [], args.weights
    names = [c for c in table.columns if c not in (*context, weight)] if wanted is None else wanted
    if not names:
        raise ValueError("fit: no column is left to fit; name some with --columns")
    roles = [*names, *context, *([weight] if weight else [])]
    twice = sorted({n for n in roles if roles.count(n) > 1})
    if twice:
        raise ValueError(f"fit: named more than once among --columns, --context and --weights: {', '.join(twice)}")
    return names, context, weight


def _weights(table: pl.DataFrame, name: str) -> np.ndarray:
    column = tables.pick(table, [name], "--weights").to_series()
    if not column.dtype.is_numeric():
        raise TypeError(f"--weights {name}: the column holds no numbers ({column.dtype})")
    return np.array(column.to_numpy(), dtype=float)


def _names(words: str | None) -> list[str] | None:
    return None if words is None else [w.strip() for w in words.split(",") if w.strip()]


def _of_columns(supports: Mapping[str, Support], names: Sequence[str], there: Sequence[str]) -> dict[str, Support]:
    """Supports of the columns to fit; a file may also describe the other columns of its table."""
    return {name: s for name, s in supports.items() if name in names or name not in there}


def _words(supports: Mapping[str, Support] | None) -> dict[str, str]:
    return {name: repr(s) for name, s in (supports or {}).items()}


def _tell_columns(frame: pl.DataFrame, supports: Mapping[str, Support] | None, context: list[str], weight: Any) -> None:
    """The column table, the other roles, and without supports what they could be: nothing is applied unasked."""
    print(tables.describe(frame, supports))
    if context or weight:
        print("; ".join([f"context: {', '.join(context)}"] * bool(context) + [f"weights: {weight}"] * bool(weight)))
    proposed = {} if supports is not None else tables.infer_supports(frame, show=False)
    if proposed:
        print("every column is fitted as real; to fit what is proposed, pass --supports with a file of these lines:")
        for name, support in proposed.items():
            print(f'  {name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name)} = "{support!r}"')
    print(flush=True)


def _held_out(model: FlowDensity, table: pl.DataFrame) -> tuple[str, pl.DataFrame]:
    """The rows to judge on: the test rows, else those that chose the weights, else those trained on."""
    held = next((name for name in ("test", "validation") if len(model.rows_[name])), "train")
    return held, table[model.rows_[held].tolist()]


def _summary(model: FlowDensity) -> str:
    """How the fit went; rows are counted as the table has them, not as they were dequantised."""
    names = ("train", "validation", "test")
    result = replace(model.result_, rows={n: model.counts_[n] for n in names if n in model.counts_})
    lines = [result.summary(), *(f"  {note}" for note in model.notes_)]
    return "\n".join(lines).replace("see test=", "see --test") + "\n"


def _how_to_resume(args: Namespace, model: FlowDensity) -> str:
    words = [w for w in args.words if w not in ("--force", "--resume")]
    count = plural("epoch", model.result_.epochs, count=True)
    return (
        f"interrupted after {count}; the best weights and a checkpoint are in {args.out}; go on "
        f"with: {shlex.join(['flowpath', *words, '--resume'])}"
    )


def _over(count: int, whole: int) -> str:
    return "" if count == whole else f" over {count} of them"


def _known(model: FlowDensity, table: pl.DataFrame, who: str) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """A table's columns as the fit knew them, and its context."""
    context = model.context_names_
    return tables.pick(table, model.schema_.names, who), tables.pick(table, context, who) if context else None


def _complete(rows: pl.DataFrame, frame: pl.DataFrame, context: pl.DataFrame | None, missing: str) -> pl.DataFrame:
    """Rows that miss no value, counted; an error where none may."""
    values = [t.to_numpy().astype(float) for t in (frame, context) if t is not None]
    absent = np.isnan(np.concatenate(values, 1)).any(1)
    if not absent.any():
        return rows
    if missing == "error":
        raise ValueError(
            f"check: missing values (NaN) in {plural('row', int(absent.sum()), count=True)}, first in row "
            f"{absent.argmax()}; pass --missing drop"
        )
    print(f"{absent.sum()} rows with missing values dropped")
    return rows.filter(~absent)


def _given(words: Sequence[str], model: FlowDensity) -> dict[str, float] | pl.DataFrame | None:
    """The context of draws: `z=0.5` words as a mapping of every context column, or a table with a row a draw."""
    context = list(model.context_names_ or ())
    if len(words) == 1 and "=" not in words[0] and words[0].lower().endswith(tables.ENDINGS) and context:
        return tables.read(words[0], context)
    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        value = _number(number)
        if not name or value is None:
            raise ValueError(f"--given expects name=number, or a table's file, got {word!r}")
        if name in model.schema_.names:
            raise ValueError(f"--given: {name} is a column of this density, not a context; fit with --context {name}")
        if name not in context:
            raise ValueError(f"--given: this run has no context {name!r}; it has {', '.join(context) or 'none'}")
        if name in found:
            raise ValueError(f"--given: {name} is given more than once")
        found[name] = value
    absent = [name for name in context if name not in found]
    if absent:
        raise ValueError(f"sample: this run needs --given {' '.join(f'{n}=...' for n in absent)}")
    return found or None


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
