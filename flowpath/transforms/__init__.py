"""Transforms, one idea a file."""

from flowpath.transforms.autoregressive import MaskedAutoregressive
from flowpath.transforms.coupling import Coupling
from flowpath.transforms.elementwise import Additive, Affine, Elementwise
from flowpath.transforms.linear import LU, Householder, Permutation, TriangularAffine
from flowpath.transforms.low_rank import LowRankAffine
from flowpath.transforms.normalization import ActNorm, Whiten
from flowpath.transforms.sinh_arcsinh import SinhArcsinh
from flowpath.transforms.spline import CircularRationalQuadratic, RationalQuadratic

__all__ = [
    "LU",
    "ActNorm",
    "Additive",
    "Affine",
    "CircularRationalQuadratic",
    "Coupling",
    "Elementwise",
    "Householder",
    "LowRankAffine",
    "MaskedAutoregressive",
    "Permutation",
    "RationalQuadratic",
    "SinhArcsinh",
    "TriangularAffine",
    "Whiten",
]
