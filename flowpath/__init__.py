"""flowpath: normalizing flows as density models, pathwise samplers and Pyro distributions."""

from flowpath import _pyro  # noqa: F401, I001  before anything that imports Pyro

import importlib
from typing import TYPE_CHECKING, Any

from flowpath import tables, testing
from flowpath.architectures import gaussian, iaf, maf, nsf, nsf_autoregressive, realnvp
from flowpath.bases import Base, BoxUniform, DiagonalNormal, NormalMixture, StandardNormal, StudentT
from flowpath.foreign_bases import ConditionalBase
from flowpath.diagnostics import (
    GradientRow,
    GradientTable,
    Report,
    check,
    ess,
    gradient_variance,
    hpd_level,
    log_evidence,
    psis,
)
from flowpath.draws import Draw, Sobol, draw
from flowpath.estimators import Enumerate, Estimator, Pathwise, Score, expectation
from flowpath.distribution import FlowDistribution
from flowpath.flow import Flow
from flowpath.interop import from_nflows, from_torch, to_nflows, to_torch
from flowpath.io import load, save
from flowpath.nets import MLP, MaskedMLP, ParamsLast, ResidualMLP, Standardize
from flowpath.objectives import ForwardKL, MaximumLikelihood
from flowpath.registry import register
from flowpath.supports import Support, above, below, integer, interval, lattice, positive, real
from flowpath.tables import infer_supports
from flowpath.training import FitResult, State, TargetResult, fit, fit_target, log_prob
from flowpath.transform import Chain, Conditioner, Element, Inverse, Record, Transform
from flowpath.transforms import (
    LU,
    ActNorm,
    Additive,
    Affine,
    CircularRationalQuadratic,
    Coupling,
    Elementwise,
    Householder,
    LowRankAffine,
    MaskedAutoregressive,
    Permutation,
    RationalQuadratic,
    TriangularAffine,
    Whiten,
)
from flowpath.variational import IWBound, LogVariance, ReverseKL

if TYPE_CHECKING:
    from flowpath import svi
    from flowpath.density import FlowDensity

__version__ = "0.1.0"

__all__ = [
    "LU",
    "MLP",
    "ActNorm",
    "Additive",
    "Affine",
    "Base",
    "BoxUniform",
    "Chain",
    "CircularRationalQuadratic",
    "ConditionalBase",
    "Conditioner",
    "Coupling",
    "DiagonalNormal",
    "Draw",
    "Element",
    "Elementwise",
    "Enumerate",
    "Estimator",
    "FitResult",
    "Flow",
    "FlowDensity",
    "FlowDistribution",
    "ForwardKL",
    "GradientRow",
    "GradientTable",
    "Householder",
    "IWBound",
    "Inverse",
    "LogVariance",
    "LowRankAffine",
    "MaskedAutoregressive",
    "MaskedMLP",
    "MaximumLikelihood",
    "NormalMixture",
    "ParamsLast",
    "Pathwise",
    "Permutation",
    "RationalQuadratic",
    "Record",
    "Report",
    "ResidualMLP",
    "ReverseKL",
    "Score",
    "Sobol",
    "StandardNormal",
    "Standardize",
    "State",
    "StudentT",
    "Support",
    "TargetResult",
    "Transform",
    "TriangularAffine",
    "Whiten",
    "above",
    "below",
    "check",
    "draw",
    "ess",
    "expectation",
    "fit",
    "fit_target",
    "from_nflows",
    "from_torch",
    "gaussian",
    "gradient_variance",
    "hpd_level",
    "iaf",
    "infer_supports",
    "integer",
    "interval",
    "lattice",
    "load",
    "log_evidence",
    "log_prob",
    "maf",
    "nsf",
    "nsf_autoregressive",
    "positive",
    "psis",
    "real",
    "realnvp",
    "register",
    "save",
    "svi",
    "tables",
    "testing",
    "to_nflows",
    "to_torch",
]


def __getattr__(name: str) -> Any:
    """FlowDensity and svi are found when they are asked for: what they import takes a second."""
    if name == "FlowDensity":
        from flowpath.density import FlowDensity

        return FlowDensity
    if name == "svi":
        return importlib.import_module("flowpath.svi")
    raise AttributeError(f"module 'flowpath' has no attribute {name!r}")
