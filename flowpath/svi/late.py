"""Guides whose flow is built at the first look at a model: dtype and device, names, saving and copying."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide.guides import AutoGuide
from torch import Tensor, nn

from flowpath.architectures import architectures
from flowpath.flow import Flow
from flowpath.svi.prototype import FlatStart
from flowpath.transforms.linear import TriangularAffine
from flowpath.transforms.low_rank import LowRankAffine
from flowpath.transforms.normalization import ActNorm, Whiten

Recipe = str | Callable[[int, int], Flow]

FULL_RANK_UP_TO = 256
RANK_ABOVE = 16
SIZES: dict[str, dict[str, Any]] = {
    "realnvp": {"transforms": 6, "hidden_features": (64, 64)},
    "iaf": {"transforms": 3, "hidden_features": (64, 64), "activation": nn.Tanh},
    "maf": {"transforms": 3, "hidden_features": (64, 64)},
    "nsf": {"transforms": 4, "hidden_features": (64, 64)},
    "nsf_autoregressive": {"transforms": 3, "hidden_features": (64, 64)},
}
"""Sizes of the architectures as guides: smaller than for data, as measured (docs/pyro.md)."""
_UNASKED = torch.float16  # the anchor's dtype until somebody calls .double() or .float()
_serial = itertools.count()


class BuiltLate(AutoGuide):
    """A guide with a `flow` that is None until the sizes are known, by a look at the model or from a state_dict.

    A subclass sets `_start`, calls `_begin` and writes `_sizes` and `_compose`.
    """

    flow: Flow | None
    _anchor: Tensor
    _recipe: Recipe | None
    _start: FlatStart | None

    def _begin(self, recipe: Recipe, options: dict[str, Any]) -> None:
        self._recipe, self._options = recipe, options
        self.register_buffer("_anchor", torch.zeros((), dtype=_UNASKED), persistent=False)
        self.flow = None
        self._name_apart()

    @property
    def _sizes(self) -> dict[str, int]:
        """What the flow's shape depends on."""
        raise NotImplementedError

    def _compose(self, sizes: dict[str, int]) -> Flow:
        """A flow of these sizes."""
        raise NotImplementedError

    def _asked(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
        """What `.to`, `.double` and the like asked for before the first look, else what the model has."""
        anchor = self._anchor
        return (
            dtype if anchor.dtype == _UNASKED else anchor.dtype,
            device if anchor.device.type == "cpu" else anchor.device,
        )

    def _build(self, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> Flow:
        flow = self._compose(sizes).to(dtype=dtype, device=device)
        self.flow = flow
        return flow

    def _ready(self) -> Flow:
        flow = self.flow
        if flow is None:
            name = type(self).__name__
            raise ValueError(f"{name} has not seen its model yet; call guide.setup(*args), or the guide itself, first")
        return flow

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` needs beside the parameters: sizes and dtype."""
        if self.flow is None:
            return {}
        return self._sizes | {"dtype": str(self.flow.base.like.dtype).removeprefix("torch.")}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Build the flow that a saved `state_dict` is of, where the guide has not seen its model yet."""
        name, sizes = type(self).__name__, {k: v for k, v in state.items() if k != "dtype"}
        if self.flow is None and state:
            if not isinstance(self._recipe, str):
                raise ValueError(
                    f"{name} built of a function cannot know what a state_dict needs; call guide.setup(*args) first"
                )
            self._build(sizes, *self._asked(getattr(torch, state["dtype"]), self._anchor.device))
        elif self.flow is not None and sizes != self._sizes:
            raise ValueError(f"{name} of sizes {self._sizes} got a state_dict of {sizes}")

    def __getstate__(self) -> dict[str, Any]:
        """The live guide is left as it is; modules are copied without what Pyro hangs on their parameters."""
        modules = {name: copy.deepcopy(module) for name, module in self._modules.items()}
        recipe = self._recipe if isinstance(self._recipe, str) else None
        return self.__dict__ | {
            "_model": None,
            "_start": None,
            "master": None,
            "_recipe": recipe,
            "_modules": modules,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name_apart()

    def __deepcopy__(self, memo: dict[int, Any]) -> BuiltLate:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.__dict__ |= {"_model": self._model, "_start": self._start, "_recipe": self._recipe}
        return new

    def _name_apart(self) -> None:
        """A name of its own in Pyro's store, where guides of one name would share parameters."""
        self._pyro_name = f"{type(self).__name__}{next(_serial) or ''}"


def check_recipe(who: str, flow: Any, options: dict[str, Any]) -> None:
    """A known architecture with options, or a function without."""
    if isinstance(flow, str):
        if flow not in architectures:
            raise ValueError(f"{who} expects an architecture of {', '.join(sorted(architectures))}, got {flow!r}")
        if "whiten" in options:
            raise ValueError(f"{who} whitens by its own affine layer; drop whiten=")
    elif isinstance(flow, Flow) or not callable(flow):
        raise TypeError(
            f"{who} expects flow= as the name of an architecture or a function (features, context) -> Flow, got "
            f"{type(flow).__name__}"
        )
    elif options:
        raise TypeError(f"{who} takes options ({', '.join(options)}) for a named architecture only")


def make_flow(who: str, recipe: Recipe | None, features: int, context: int, options: dict[str, Any]) -> Flow:
    """The flow inside the affine layer."""
    if isinstance(recipe, str):
        return architectures[recipe](features, context, whiten="none", **SIZES.get(recipe, {}) | options)
    flow = recipe(features, context) if recipe is not None else None
    if not isinstance(flow, Flow) or flow.event_shape != (features,) or flow.context != context:
        want = f"a context of {context}" if context else "no context"
        raise ValueError(f"{who} expects its function to return a Flow of {features} features and {want}")
    if not flow.has_rsample:
        raise ValueError(f"{who} needs a flow with rsample; its base {type(flow.base).__name__} has none")
    unset = [type(m).__name__ for m in flow.modules() if isinstance(m, (Whiten, ActNorm)) and not bool(m.is_set)]
    if unset:
        raise ValueError(f'{who} never shows its flow data to set {unset[0]} from; build it with whiten="none"')
    return flow


def affine_layer(features: int, rank: int | None) -> TriangularAffine | LowRankAffine:
    """Full rank up to a size, diagonal times low rank above it or where a rank is given."""
    if rank is None and features <= FULL_RANK_UP_TO:
        return TriangularAffine(features)
    return LowRankAffine(features, min(RANK_ABOVE if rank is None else rank, features))
