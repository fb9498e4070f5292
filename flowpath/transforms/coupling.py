"""Coupling: one part of the features is transformed by an Element whose numbers come from the other part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowpath.layout import features_first, features_last
from flowpath.registry import register
from flowpath.transform import Conditioner, Direction, Element, Record, Transform
from flowpath.transforms.driven import drive
from flowpath.transforms.elementwise import check_conditioner


@register("Coupling")
class Coupling(Transform):
    r"""A coupling layer: with A the kept and B the transformed features,

    .. math:: z_A = u(x_A), \qquad z_B = \tau(x_B;\, h(x_A, c)), \qquad
        \text{ladj} = \sum_{i \in B} \log \tau'(x_i) + \sum_{i \in A} \log u'(x_i)

    with u the identity unless `unconditional` is given. One parallel pass either way, exact: the inverse keeps A, hence
    h, and inverts the Element.

    "NICE" (Dinh et al. 2014, arXiv:1410.8516), "Real NVP" (2016, arXiv:1605.08803); with splines, "Neural Spline Flows"
    (Durkan et al. 2019, arXiv:1906.04032).

    Args:
        mask: one bool a feature, True where it is transformed; at least one of each.
        element: the Element tau.
        conditioner: a Conditioner h: `(*batch, |A|)`, context -> `(num_params, *batch, |B|)`.
        context: width of the context.
        unconditional: a Transform of |A| features for the kept ones (an `Elementwise`), or None.

    Raises:
        ValueError: a mask that is all True or all False, or parts whose sizes do not fit it.

    Example:
        >>> import torch, flowpath as fp
        >>> spline = fp.RationalQuadratic(8)
        >>> t = fp.Coupling([False, True, True], spline, fp.MLP(1, 2, num_params=spline.num_params))
        >>> x = torch.randn(5, 3)
        >>> z, ladj = t(x)
        >>> torch.allclose(t.inverse(z)[0], x)
        True
    """

    kept: Tensor
    moved: Tensor

    def __init__(
        self,
        mask: Sequence[bool],
        element: Element,
        conditioner: Conditioner,
        *,
        context: int = 0,
        unconditional: Transform | None = None,
    ) -> None:
        bits = torch.as_tensor(mask, dtype=torch.bool)
        if bits.dim() != 1 or bits.all() or not bits.any():
            raise ValueError(f"Coupling expects a mask with both True and False, got {bits.tolist()}")
        super().__init__(len(bits), context)
        check_conditioner("Coupling", conditioner, element)
        kept, moved = (~bits).nonzero().squeeze(-1), bits.nonzero().squeeze(-1)
        for name, want in (("in_features", len(kept)), ("out_features", len(moved)), ("context", context)):
            if getattr(conditioner, name, want) != want:
                raise ValueError(
                    f"Coupling: this mask expects a conditioner with {name}={want}, got {getattr(conditioner, name)}"
                )
        if unconditional is not None and unconditional.data_shape not in (None, torch.Size([len(kept)])):
            raise ValueError(
                f"Coupling expects `unconditional` for {len(kept)} features, got {unconditional.data_shape}"
            )
        self.element, self.conditioner, self.unconditional = element, conditioner, unconditional
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("moved", moved, persistent=False)
        self._sizes = len(kept), len(moved)
        order = torch.cat([kept, moved] if kept[0] < moved[0] else [moved, kept])
        self._moved_first = bool(moved[0] < kept[0])
        self._blocks = torch.equal(order, torch.arange(len(bits)))
        self._alternate = len(bits) % 2 == 0 and bool((bits.view(-1, 2) == bits[:2]).all())

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept and the moved of x `(d, *batch)`; views where the mask is two blocks or alternates."""
        if self._blocks:
            sizes = self._sizes[::-1] if self._moved_first else self._sizes
            a, b = x.split(sizes)
        elif self._alternate:
            a, b = x.view(x.shape[0] // 2, 2, *x.shape[1:]).unbind(1)
        else:
            return x.index_select(0, self.kept), x.index_select(0, self.moved)
        return (b, a) if self._moved_first else (a, b)

    def _join(self, like: Tensor, kept: Tensor, moved: Tensor, *, kept_as_is: bool) -> Tensor:
        """Both parts in place, features first; `kept_as_is` says that `like` holds the kept part already."""
        parts = (moved, kept) if self._moved_first else (kept, moved)
        if self._blocks:
            return torch.cat(parts)
        if self._alternate:
            return torch.stack(parts, 1).view(like.shape)
        if kept_as_is:
            return like.index_copy(0, self.moved, moved)
        return torch.empty_like(like).index_copy(0, self.kept, kept).index_copy(0, self.moved, moved)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = features_first(x)
        kept, moved = self._split(x)
        out, ladj = drive(self.element, self.conditioner, kept, moved, context, inverse=False)
        total = ladj.sum(0)
        if self.unconditional is not None:
            kept, more = self._alone("forward", kept)
            total = total + more
        return features_last(self._join(x, kept, out, kept_as_is=self.unconditional is None)), total

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z = features_first(z)
        kept, moved = self._split(z)
        more: Tensor | float = 0.0
        if self.unconditional is not None:
            kept, more = self._alone("inverse", kept)
        out, ladj = drive(self.element, self.conditioner, kept, moved, context, inverse=True)
        return features_last(self._join(z, kept, out, kept_as_is=self.unconditional is None)), ladj.sum(0) + more

    def _alone(self, direction: Direction, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The kept features through `unconditional`."""
        value, ladj = self.unconditional.run(direction, features_last(kept), None)  # type: ignore[union-attr]
        return features_first(value), ladj

    def record(self, direction: Direction, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Record]:
        if self.unconditional is not None:
            return super().record(direction, value, context)
        with torch.enable_grad():
            first = features_first(value)
            kept, moved = (v if v.requires_grad else v.detach().requires_grad_() for v in self._split(first))
            out, ladj = drive(self.element, self.conditioner, kept, moved, context, direction == "inverse")
            output = features_last(self._join(first, kept, out, kept_as_is=True))
        return output, ladj.sum(0), Record(direction, output, context, (kept, moved, out, ladj))

    def pull_score(self, record: Record, score: Tensor) -> Tensor:
        """The closed form of a coupling: one local product through the conditioner, whose graph `record` kept.

        With tau the recorded direction: G'_B = (G_B - d log tau') / tau', and
        G'_A = G_A - d_A [<G'_B, tau(x_B; h(x_A))> + sum log tau'] with G'_B and x_B held.
        """
        if record.extra is None:
            return super().pull_score(record, score)
        kept, moved, out, ladj = record.extra
        score = features_first(score)
        g_kept, g_moved = self._split(score)
        one = torch.ones_like(ladj)
        if ladj.requires_grad:
            (slope,) = torch.autograd.grad(ladj, moved, one, retain_graph=True, allow_unused=True)
            g_moved = g_moved if slope is None else g_moved - slope
        g_moved = g_moved * (-ladj.detach()).exp()
        outputs = [(o, c) for o, c in ((out, g_moved), (ladj, one)) if o.requires_grad]
        (pulled,) = torch.autograd.grad(
            [o for o, _ in outputs], kept, [c for _, c in outputs], retain_graph=True, allow_unused=True
        )
        g_kept = g_kept if pulled is None else g_kept - pulled
        return features_last(self._join(score, g_kept, g_moved, kept_as_is=False))
