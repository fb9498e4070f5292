"""flowpath: normalizing flows as density models, pathwise samplers and Pyro distributions."""

from flowpath import _pyro  # noqa: F401, I001  before anything that imports Pyro

from flowpath import testing
from flowpath.architectures import gaussian, iaf, maf, nsf, nsf_autoregressive, realnvp
from flowpath.bases import (
    Base,
    BoxUniform,
    ConditionalBase,
    DiagonalNormal,
    NormalMixture,
    StandardNormal,
    StudentT,
)
from flowpath.flow import Flow, FlowDistribution
from flowpath.interop import from_torch
from flowpath.io import load, save
from flowpath.nets import MLP, MaskedMLP, ParamsLast, ResidualMLP, Standardize
from flowpath.objectives import MaximumLikelihood
from flowpath.registry import register
from flowpath.training import FitResult, fit, log_prob
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
    MaskedAutoregressive,
    Permutation,
    RationalQuadratic,
    TriangularAffine,
    Whiten,
)

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
    "Element",
    "Elementwise",
    "FitResult",
    "Flow",
    "FlowDistribution",
    "Householder",
    "Inverse",
    "MaskedAutoregressive",
    "MaskedMLP",
    "MaximumLikelihood",
    "NormalMixture",
    "ParamsLast",
    "Permutation",
    "RationalQuadratic",
    "Record",
    "ResidualMLP",
    "StandardNormal",
    "Standardize",
    "StudentT",
    "Transform",
    "TriangularAffine",
    "Whiten",
    "fit",
    "from_torch",
    "gaussian",
    "iaf",
    "load",
    "log_prob",
    "maf",
    "nsf",
    "nsf_autoregressive",
    "realnvp",
    "register",
    "save",
    "testing",
]
