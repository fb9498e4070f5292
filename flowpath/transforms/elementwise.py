"""Maps that act on each feature alone: the simplest Elements, and the structure that applies any Element."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowpath.eager import number
from flowpath.registry import register
from flowpath.transform import Conditioner, Element, Transform


@register("Additive")
class Additive(nn.Module):
    r"""y = x + t: the Element of "NICE" (Dinh, Krueger, Bengio 2014, arXiv:1410.8516). Volume preserving.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.Additive().forward(torch.tensor([1.0]), torch.tensor([[2.0]]))[0]
        tensor([3.])
    """

    num_params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x `(*batch, d)`, params `(1, *batch, d)` -> (y, ladj), each `(*batch, d)`."""
        y = x + params[0]
        return y, torch.zeros_like(y)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: x = y - t."""
        x = y - params[0]
        return x, torch.zeros_like(x)


class ScaleAndShift(nn.Module, ABC):
    """y = s x + t, s positive: what the affine Elements share. Both directions are exact."""

    num_params = 2

    @abstractmethod
    def _scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """s and log s of raw numbers."""

    def features_first(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The same with features first: the formula asks for no order."""
        return self.inverse(x, numbers) if inverse else self.forward(x, numbers)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x `(*batch, d)`, params (a, t) `(2, *batch, d)` -> (y, ladj), each `(*batch, d)`."""
        raw, shift = params.unbind(0)
        s, log_s = self._scale(raw)
        y = torch.addcmul(shift, s, x)
        return y, log_s if log_s.shape == y.shape else log_s.expand_as(y)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: x = (y - t) / s, ladj -log s."""
        raw, shift = params.unbind(0)
        s, log_s = self._scale(raw)
        x = (y - shift) / s
        return x, -log_s if log_s.shape == x.shape else -log_s.expand_as(x)


@register("Affine")
class Affine(ScaleAndShift):
    r"""y = s x + t with a positive scale s: the Element of RealNVP, MAF and IAF.

    With raw number a, by default :math:`s = \operatorname{softplus}(a + c) + s_{min}`, c such that a = 0 gives s = 1
    (it grows linearly in a, so that no net can blow up exponentially). With `log_bound` b instead
    :math:`\log s = b \tanh(a / b)`, which keeps s within :math:`e^{\pm b}`. ladj is log s per feature; both
    directions are exact.

    "Density estimation using Real NVP" (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803).

    Args:
        min_scale: the floor of the softplus scale, in (0, 1).
        log_bound: bound on |log s|; None for the softplus scale.

    Raises:
        ValueError: a floor outside (0, 1) or a bound that is not positive.

    Example:
        >>> import torch, flowpath as fp
        >>> y, ladj = fp.Affine().forward(torch.tensor([3.0]), torch.zeros(2, 1))
        >>> torch.allclose(y, torch.tensor([3.0])), torch.allclose(ladj, torch.tensor([0.0]), atol=1e-6)
        (True, True)
    """

    def __init__(self, *, min_scale: float = 1e-3, log_bound: float | None = None) -> None:
        super().__init__()
        if not 0.0 < min_scale < 1.0:
            raise ValueError(f"Affine expects min_scale in (0, 1), got {min_scale}")
        if log_bound is not None and not log_bound > 0.0:
            raise ValueError(f"Affine expects log_bound > 0, got {log_bound}")
        self.min_scale, self.log_bound = min_scale, log_bound
        self._offset = math.log(math.expm1(1.0 - min_scale))

    def _scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        if self.log_bound is not None:
            log_s = self.log_bound * torch.tanh(raw / self.log_bound)
            return log_s.exp(), log_s
        s = F.softplus(raw + number(self._offset, raw)) + number(self.min_scale, raw)
        return s, s.log()


@register("Elementwise")
class Elementwise(Transform):
    """An Element applied to every feature, its numbers free parameters or functions of the context.

    z_i = tau(x_i; params_i), ladj = sum_i log |tau'|. Parallel and exact both ways.

    Args:
        features: width of the event.
        element: any Element.
        conditioner: a Conditioner that is given the context as its x, `(*batch, C) -> (num_params, *batch, features)`;
            None for free parameters, which start at zero: the identity.
        context: width of the context, where there is a conditioner.

    Raises:
        ValueError: a context without a conditioner or the reverse, or a conditioner of another `num_params`.

    Example:
        >>> import torch, flowpath as fp
        >>> t = fp.Elementwise(3, fp.RationalQuadratic(8))
        >>> z, ladj = t(torch.randn(5, 3))
        >>> z.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self, features: int, element: Element, conditioner: Conditioner | None = None, *, context: int = 0
    ) -> None:
        super().__init__(features, context)
        check_element("Elementwise", element)
        if (conditioner is None) != (context == 0):
            raise ValueError("Elementwise expects a conditioner together with context > 0, or neither")
        self.element = element
        if conditioner is None:
            self.params = nn.Parameter(torch.zeros(element.num_params, features))
        else:
            check_conditioner("Elementwise", conditioner, element)
        self.conditioner = conditioner

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.conditioner is not None:
            return self.conditioner(context)  # type: ignore[arg-type]
        return self.params.view(len(self.params), *(1,) * (x.dim() - 1), -1)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, ladj = self.element.forward(x, self._params(x, context))
        return z, ladj.sum(-1)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, ladj = self.element.inverse(z, self._params(z, context))
        return x, ladj.sum(-1)


def check_element(who: str, element: Element) -> None:
    """It has what the protocol asks for."""
    if not isinstance(element, Element):
        raise TypeError(
            f"{who} expects an Element, got {type(element).__name__}; an Element has num_params, forward(x, params), "
            "and inverse(y, params)"
        )


def check_conditioner(who: str, conditioner: Conditioner, element: Element) -> None:
    """The conditioner emits as many numbers a feature as the element takes, or an error that says so."""
    check_element(who, element)
    given = getattr(conditioner, "num_params", element.num_params)
    if given != element.num_params:
        raise ValueError(
            f"{who}: {type(element).__name__} expects {element.num_params} params a feature, "
            f"{type(conditioner).__name__} gives {given}; build it with num_params=element.num_params"
        )
