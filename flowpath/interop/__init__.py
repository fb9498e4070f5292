"""Adapters to and from other libraries: transforms of torch and Pyro, transforms and flows of nflows."""

from flowpath.interop.as_nflows import to_nflows
from flowpath.interop.as_torch import TransformForTorch, to_torch
from flowpath.interop.nflows_parts import NflowsBase, NflowsConditionalNormal, NflowsTransform
from flowpath.interop.nflows_twins import GatedResidualMLP, MaskedResidualMLP, SigmoidAffine
from flowpath.interop.of_nflows import from_nflows
from flowpath.interop.torch_transforms import TorchTransform, from_torch

__all__ = [
    "GatedResidualMLP",
    "MaskedResidualMLP",
    "NflowsBase",
    "NflowsConditionalNormal",
    "NflowsTransform",
    "SigmoidAffine",
    "TorchTransform",
    "TransformForTorch",
    "from_nflows",
    "from_torch",
    "to_nflows",
    "to_torch",
]
