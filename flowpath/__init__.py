"""flowpath: normalizing flows as density models, pathwise samplers and Pyro distributions.

A name is imported when it is first asked for, so that `flowpath --help` need not wait for torch.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowpath import plot, svi, tables, testing
    from flowpath.architectures import gaussian, iaf, maf, nsf, nsf_autoregressive, realnvp
    from flowpath.bases import Base, BoxUniform, DiagonalNormal, NormalMixture, StandardNormal, StudentT
    from flowpath.density import FlowDensity
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
    from flowpath.distribution import FlowDistribution
    from flowpath.draws import Draw, Sobol, draw
    from flowpath.estimators import Enumerate, Estimator, Pathwise, Score, expectation
    from flowpath.flow import Flow
    from flowpath.foreign_bases import ConditionalBase
    from flowpath.interop import from_nflows, from_torch, to_nflows, to_torch
    from flowpath.io import load, save
    from flowpath.nets import MLP, GatedMLP, MaskedMLP, ParamsLast, ResidualMLP
    from flowpath.objectives import ForwardKL, MaximumLikelihood
    from flowpath.registry import register
    from flowpath.standardize import Standardize
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
        SinhArcsinh,
        TriangularAffine,
        Whiten,
    )
    from flowpath.variational import IWBound, LogVariance, ReverseKL

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
    "GatedMLP",
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
    "SinhArcsinh",
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
    "plot",
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

# The names that each module gives to __all__; a type checker reads the imports above instead.
_GIVES = {
    "architectures": "gaussian iaf maf nsf nsf_autoregressive realnvp",
    "bases": "Base BoxUniform DiagonalNormal NormalMixture StandardNormal StudentT",
    "density": "FlowDensity",
    "diagnostics": "GradientRow GradientTable Report check ess gradient_variance hpd_level log_evidence psis",
    "distribution": "FlowDistribution",
    "draws": "Draw Sobol draw",
    "estimators": "Enumerate Estimator Pathwise Score expectation",
    "flow": "Flow",
    "foreign_bases": "ConditionalBase",
    "interop": "from_nflows from_torch to_nflows to_torch",
    "io": "load register save",
    "nets": "MLP GatedMLP MaskedMLP ParamsLast ResidualMLP",
    "objectives": "ForwardKL MaximumLikelihood",
    "standardize": "Standardize",
    "supports": "Support above below integer interval lattice positive real",
    "tables": "infer_supports",
    "training": "FitResult State TargetResult fit fit_target log_prob",
    "transform": "Chain Conditioner Element Inverse Record Transform",
    "transforms": (
        "ActNorm Additive Affine CircularRationalQuadratic Coupling Elementwise Householder LU LowRankAffine "
        "MaskedAutoregressive Permutation RationalQuadratic SinhArcsinh TriangularAffine Whiten"
    ),
    "variational": "IWBound LogVariance ReverseKL",
}
_HOME = {name: module for module, names in _GIVES.items() for name in names.split()}


if not TYPE_CHECKING:  # to a type checker it would promise any name

    def __getattr__(name: str) -> Any:
        """A name of __all__ or a module of flowpath, imported now and kept."""
        if name in _HOME:
            value = getattr(importlib.import_module(f"flowpath.{_HOME[name]}"), name)
        else:
            value = _module(name)
        globals()[name] = value
        return value


def _module(name: str) -> ModuleType:
    """A module of flowpath, or an AttributeError where there is none of that name."""
    try:
        if not name.startswith("_"):
            return importlib.import_module(f"flowpath.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"flowpath.{name}":
            raise
    raise AttributeError(f"module 'flowpath' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
