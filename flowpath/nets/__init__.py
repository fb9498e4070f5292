"""Conditioners: networks that turn features and a context into the numbers of an Element.

All of them compute with the batch as the last, contiguous axis ("feature major"): a layer is `W @ h` with h of shape
`(width, batch)`. The last product then comes out as `(num_params, features, batch)`, which is what the Elements, whose
wide operations run over the parameter axis, read fastest.
"""

from flowpath.nets.gated import GatedMLP
from flowpath.nets.masked import MaskedMLP
from flowpath.nets.mlp import MLP
from flowpath.nets.params_last import ParamsLast
from flowpath.nets.residual import ResidualMLP
from flowpath.nets.rows import PickedMLP, RowMLP

__all__ = ["MLP", "GatedMLP", "MaskedMLP", "ParamsLast", "PickedMLP", "ResidualMLP", "RowMLP"]
