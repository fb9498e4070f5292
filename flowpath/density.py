"""FlowDensity: a flow as a scikit-learn density estimator for tables, with columns, supports, weights and integers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from flowpath.tables import intake
from flowpath.tables.columns import Schema, is_frame, pick
from flowpath.tables.intake import AtBound, Missing
from flowpath.tables.layout import Layout, cell_points, resolve
from flowpath.tables.learning import Plan, learn
from flowpath.tables.presets import Architecture
from flowpath.tables.scores import draw, log_mass
from flowpath.tables.sidecar import read_density, write_density
from flowpath.training.rows import plural

_OF_FIT = ("batch_size", "epochs", "steps", "learning_rate", "patience", "time_limit", "device", "compile")
_OF_FLOW = ("transforms", "hidden_features", "dropout", "whiten")


class FlowDensity(DensityMixin, BaseEstimator):
    r"""A normalizing flow as a density estimator for tables, with scikit-learn's contract.

    Columns are mapped from their supports to the whole space in float64, a flow is fitted to the result by maximum
    likelihood, and all log densities are in nats in the user's own units. Where columns are integers or lattices the
    score is the log of density times probability mass,

    .. math:: \log P(x) = \log \frac1K \sum_{k=1}^K q(x + (u_k - \tfrac12)\,\text{step}) \cdot \text{step},

    with K fixed Sobol points u_k of the cell: deterministic, and exact as K grows. Training sees such columns
    dequantised: spread uniformly over their cells, which bounds log P from below ("A note on the evaluation of
    generative models", Theis, van den Oord, Bethge 2015, arXiv:1511.01844).

    Args:
        supports: mapping from columns (names, or positions) to `fp.positive()`, `fp.integer(0)`, ..., their words or
            torch constraints; a sequence with one a column; the path of a TOML file; None: every column is real.
        architecture: the name of one, or a function (features, context, **options) -> Flow.
        transforms, hidden_features, dropout, whiten: of the architecture; None leaves them to it, or to the preset.
        options: a dict with any other options of the architecture.
        regularise: the preset for small tables (dropout, a small net): "auto" below 2,000 rows, True,
            False.
        cell_points: K, a power of two.
        at_bound: what to do with values exactly on an open bound: "error", or "nudge" them halfway to the nearest value
            inside, counted.
        missing: what to do with rows that miss a value: "error", or "drop" them, counted; their scores are NaN.
        validation, test: shares of the rows held out, to stop early on and to score once at the end.
        batch_size, epochs, steps, learning_rate, patience, time_limit, device, compile: as `fp.fit`.
        dtype: in which the fitted flow scores and samples; "float32", in which it is trained, is two to three times
            faster, and a row's score then moves in the seventh digit with the rows it is scored beside.
        fit_options: a dict with any other settings of `fp.fit`, such as checkpoint, resume, progress, callbacks.
        random_state: an int, a NumPy RandomState or None: seeds split, weights, training and sampling.

    Attributes:
        flow_: the fitted Flow, over the cells, in the user's units.
        result_: the `FitResult`; its held-out scores are those of `score_samples`.
        counts_: rows passed, missing, nudged, used, and how many went to train, validation and test.
        notes_: what else a report should say.
        rows_: positions of the training, validation and test rows in the table passed to `fit`.
        supports_: one `Support` a column.
        schema_, context_names_: the columns of the table and of the context.
        n_features_in_, feature_names_in_: as scikit-learn has them.

    Example:
        >>> import pandas as pd, numpy as np, flowpath as fp
        >>> rng = np.random.default_rng(0)
        >>> df = pd.DataFrame({"z": rng.exponential(size=300), "n": rng.poisson(3, 300)})
        >>> model = fp.FlowDensity({"z": fp.positive(), "n": fp.integer(0)}, "gaussian", steps=50, random_state=0)
        >>> model.fit(df).score_samples(df).shape
        (300,)
        >>> model.sample(2, random_state=0).dtypes.astype(str).to_dict()
        {'z': 'float64', 'n': 'int64'}
    """

    def __init__(
        self,
        supports: Any = None,
        architecture: Architecture = "nsf",
        *,
        transforms: int | None = None,
        hidden_features: Sequence[int] | None = None,
        dropout: float | None = None,
        whiten: str | None = None,
        options: Mapping[str, Any] | None = None,
        regularise: Any = "auto",
        cell_points: int = 16,
        at_bound: AtBound = "error",
        missing: Missing = "error",
        validation: float | None = 0.1,
        test: float | None = None,
        batch_size: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        learning_rate: float = 1e-3,
        patience: int | None = 20,
        time_limit: float | None = None,
        device: Any = "auto",
        compile: Any = "auto",
        dtype: str = "float64",
        fit_options: Mapping[str, Any] | None = None,
        random_state: Any = None,
    ) -> None:
        self.supports = supports
        self.architecture = architecture
        self.transforms = transforms
        self.hidden_features = hidden_features
        self.dropout = dropout
        self.whiten = whiten
        self.options = options
        self.regularise = regularise
        self.cell_points = cell_points
        self.at_bound = at_bound
        self.missing = missing
        self.validation = validation
        self.test = test
        self.batch_size = batch_size
        self.epochs = epochs
        self.steps = steps
        self.learning_rate = learning_rate
        self.patience = patience
        self.time_limit = time_limit
        self.device = device
        self.compile = compile
        self.dtype = dtype
        self.fit_options = fit_options
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, context: Any = None) -> FlowDensity:
        """Fit to a table.

        Args:
            X: pandas or polars DataFrame, or array `(N, D)`.
            y: ignored.
            sample_weight: one number a row.
            context: rows `(N, C)`: a DataFrame, or an array.

        Raises:
            TypeError, ValueError: settings that make no sense; columns that are no numbers, constant or identical;
                missing or infinite values, or values outside their supports, with rows and columns.
        """
        self._check_settings()
        seed = intake.seed_of_fit(self.random_state)
        who = "FlowDensity.fit"
        x, schema = self._first_rows(X)
        c, context_names = intake.first_context(context, who)
        layout = Layout(resolve(self.supports, schema.names))
        points = cell_points(self.cell_points, layout.lattices)
        taken = intake.take(x, c, sample_weight, layout, schema.quoted, self.at_bound, self.missing, who)
        rows = intake.split(len(taken.x), self.validation, self.test, seed)
        self.result_, notes = learn(self._plan(seed), taken, rows, layout, points, schema.quoted)
        self.schema_, self.context_names_ = schema, context_names
        self.supports_, self.layout_, self.points_, self.nudges_ = layout.supports, layout, points, taken.nudges
        self.flow_ = self.result_.flow
        self.counts_ = {**taken.counts, **{name: len(i) for name, i in rows.items() if len(i)}}
        self.rows_ = {name: taken.kept[i].numpy() for name, i in rows.items()}
        self.notes_ = [*taken.notes, *notes]
        return self

    def score_samples(self, X: Any, context: Any = None) -> np.ndarray:
        """Log density in nats of each row `(N,)`, in the user's units; for lattices times the mass of the cell.

        -inf outside the supports; NaN for rows that miss a value where `missing="drop"`.

        Raises:
            ValueError: a column that is not there; missing values where they are not allowed; a context that is missing
                or does not fit. NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        who = "FlowDensity.score_samples"
        x, c = self._known_rows(X, who), intake.known_context(context, self.context_names_, who)
        intake.check_rows(x, c, who)
        absent = x.isnan().any(1) if c is None else x.isnan().any(1) | c.isnan().any(1)
        if bool(absent.any()) and self.missing == "error":
            raise ValueError(
                f"{who}: missing values (NaN) in {plural('row', int(absent.sum()), count=True)}, first in row "
                f"{int(absent.nonzero()[0])}; pass missing='drop' to score them NaN"
            )
        if self.at_bound == "nudge":
            x = self.layout_.nudge(x, self.nudges_)
        inside = ~(self.layout_.outside(x) | self.layout_.on_bound(x)).any(1) & ~absent
        found = torch.full((len(x),), -torch.inf, dtype=torch.float64)
        found[absent] = torch.nan
        held = None if c is None else c[inside]
        found[inside] = log_mass(self.flow_, self.layout_, x[inside], held, self.points_)
        return found.numpy()

    def score(self, X: Any, y: Any = None, sample_weight: Any = None, context: Any = None) -> float:
        """Weighted mean log density in nats a row; -inf where a row with weight is outside the supports."""
        values = self.score_samples(X, context)
        held = intake.check_weights(sample_weight, len(values), "FlowDensity.score")
        w = np.ones(len(values)) if held is None else held.numpy()
        used = (w != 0) & ~np.isnan(values)
        if not w[used].sum() > 0:
            raise ValueError("FlowDensity.score: there is no row to average: all miss a value or weigh nothing")
        return float(w[used] @ values[used] / w[used].sum())

    def sample(self, n_samples: int = 1, context: Any = None, random_state: Any = None) -> Any:
        """Draws as a table like the one `fit` saw: a DataFrame where it was one, whole numbers where they were.

        Args:
            n_samples: how many.
            context: one row for all draws, as a mapping from its columns to numbers, a DataFrame or an array; or a row
                for each draw.
            random_state: in place of the estimator's own.
        """
        check_is_fitted(self)
        if not isinstance(n_samples, int | np.integer) or n_samples < 1:
            raise ValueError(f"FlowDensity.sample expects n_samples to be a whole number above 0, got {n_samples!r}")
        who, names = "FlowDensity.sample", self.context_names_
        c = (
            intake.one_row(context, names or (), who)
            if isinstance(context, dict)
            else intake.known_context(context, self.context_names_, who)
        )
        c = intake.ones_or_each(c, int(n_samples), who)
        seed = intake.seed_of(self.random_state if random_state is None else random_state)
        values = draw(self.flow_, self.layout_, int(n_samples), c, seed)
        return self.schema_.restore(values.numpy(), self.supports_)

    def to_cells(self, X: Any, random_state: Any = 0) -> Tensor:
        """Rows as `flow_` takes them: float64 `(N, D)`, lattices spread over their cells; for `fp.check` and the like.

        Raises:
            ValueError: as `score_samples`; rows outside the supports.
        """
        check_is_fitted(self)
        who = "FlowDensity.to_cells"
        x = self._known_rows(X, who)
        x = self.layout_.nudge(x, self.nudges_) if self.at_bound == "nudge" else x
        taken = intake.take(x, None, None, self.layout_, self.schema_.quoted, "error", "error", who)
        return self.layout_.dequantise(taken.x, torch.Generator().manual_seed(intake.seed_of(random_state)))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the estimator to a .safetensors file, or to a folder, with its table of columns as table.json beside.

        No pickle: weights, columns, supports, units (nats), K and its points, column dtypes. Into a folder go
        model.safetensors, table.json, history.csv and fit.json.

        Raises:
            TypeError: a part of the flow is not registered. OSError: the place cannot be written.
        """
        check_is_fitted(self)
        return write_density(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FlowDensity:
        """The fitted estimator that `save` wrote.

        Raises:
            FileNotFoundError: no such file. ValueError: a file that holds something else.
        """
        return read_density(cls, Path(path))

    def _plan(self, seed: int) -> Plan:
        options = {name: getattr(self, name) for name in _OF_FLOW if getattr(self, name) is not None}
        settings = {name: getattr(self, name) for name in _OF_FIT}
        return Plan(
            self.architecture,
            {**(self.options or {}), **options},
            self.regularise,
            {**settings, **(self.fit_options or {})},
            getattr(torch, self.dtype),
            seed,
        )

    def _check_settings(self) -> None:
        choices = {"at_bound": ("error", "nudge"), "missing": ("error", "drop"), "dtype": ("float64", "float32")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"FlowDensity expects {name} to be one of {known}, got {getattr(self, name)!r}")
        if self.regularise not in ("auto", True, False):
            raise ValueError(f'FlowDensity expects regularise to be "auto", True or False, got {self.regularise!r}')

    def _first_rows(self, X: Any) -> tuple[Tensor, Schema]:
        """The table of `fit` and its schema; sets scikit-learn's attributes."""
        if is_frame(X):
            validate_data(self, X, skip_check_array=True)
            return intake.numbers(X, None, "FlowDensity.fit", "X"), Schema.of(X)
        array = validate_data(self, intake.as_array(X), dtype=np.float64, ensure_all_finite=False, ensure_min_samples=2)
        return intake.numbers(array, None, "FlowDensity.fit", "X"), Schema.of(array)

    def _known_rows(self, X: Any, who: str) -> Tensor:
        """A later table's columns as `fit` knew them: a frame's by name, an array's by position."""
        names = self.schema_.names
        if is_frame(X) and self.schema_.kind != "array":
            X = pick(X, names, who)
        elif is_frame(X):
            validate_data(self, X, skip_check_array=True, reset=False)
        else:
            X = validate_data(self, intake.as_array(X), dtype=np.float64, ensure_all_finite=False, reset=False)
        return intake.numbers(X, names, who, "X")
