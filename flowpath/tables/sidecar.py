"""A fitted table estimator as a file without pickle: the flow, and as JSON its columns, supports and settings."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from flowpath import io
from flowpath.io import storage
from flowpath.supports import as_support
from flowpath.tables.columns import Schema
from flowpath.tables.layout import Layout
from flowpath.training.results import FitResult

T = TypeVar("T")
_NAME, _FORMAT = "flow.safetensors", 1
_UNITS = "nats: log of density, per unit of each continuous column, times probability mass of the lattices' cells"


def write_density(model: Any, path: Path) -> Path:
    """Write a fitted FlowDensity to a .safetensors file or into a folder; returns the path."""
    held = _describe(model)
    file = path
    if path.suffix != ".safetensors":
        model.result_.save(path)
        file = path / _NAME
    training = {**model.result_.training(), "history": model.result_.history, "density": held}
    io.save(model.flow_, file, training=training)
    if file is not path:
        (path / "table.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    return path


def read_density(cls: type[T], path: Path) -> T:
    """The fitted estimator from such a file or folder.

    Raises:
        FileNotFoundError: no such file. ValueError: a file that holds something else, or is of a newer format.
    """
    file = path / _NAME if path.is_dir() else path
    flow = io.load(file)
    training = (storage.read_config(file, io.KEY) or {}).get("training") or {}
    held = training.get("density")
    if held is None:
        raise ValueError(f"FlowDensity.load: {file} holds a flow without a table around it; read it with fp.load")
    storage.check_format(held, _FORMAT, file, "FlowDensity.load")
    supports = tuple(as_support(c["support"], repr(c["name"])) for c in held["columns"])
    model: Any = cls(**{**held["settings"], "supports": list(supports)})
    model.schema_ = Schema.from_json(held["schema"])
    model.context_names_ = None if held["context"] is None else tuple(held["context"])
    model.supports_, model.layout_, model.flow_ = supports, Layout(supports), flow
    model.points_ = torch.tensor(held["points"], dtype=torch.float64).reshape(len(held["points"]), -1)
    model.nudges_ = torch.tensor([[float(v) for v in row] for row in held["nudges"]], dtype=torch.float64)
    model.counts_, model.notes_ = held["counts"], held["notes"]
    model.rows_ = {name: np.array(i, dtype=np.int64) for name, i in held["held_out"].items()}
    model.n_features_in_ = len(supports)
    if held["named"]:
        model.feature_names_in_ = np.array(model.schema_.names, dtype=object)
    known = {f.name for f in fields(FitResult)}
    model.result_ = FitResult(flow=flow, **{k: v for k, v in training.items() if k in known})
    return model


def _describe(model: Any) -> dict[str, Any]:
    """All but the weights, as JSON values."""
    schema = model.schema_
    columns = zip(schema.names, schema.dtypes, model.supports_, strict=True)
    return {
        "format": _FORMAT,
        "columns": [{"name": n, "dtype": d, "support": repr(s)} for n, d, s in columns],
        "context": None if model.context_names_ is None else list(model.context_names_),
        "units": _UNITS,
        "cell_points": len(model.points_),
        "points": model.points_.tolist(),
        "nudges": [[str(v) for v in row] for row in model.nudges_.tolist()],
        "counts": model.counts_,
        "notes": model.notes_,
        "held_out": {n: i.tolist() for n, i in model.rows_.items() if n != "train"},
        "schema": schema.to_json(),
        "named": hasattr(model, "feature_names_in_"),
        "settings": {k: v for k, v in model.get_params(deep=False).items() if k != "supports" and _is_json(v)},
    }


def _is_json(value: Any) -> bool:
    """Whether a setting can be kept; functions and random states cannot, and fall back to their defaults."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
