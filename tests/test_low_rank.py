"""LowRankAffine against dense matrices, and affine layers set to a location and scale."""

from __future__ import annotations

import pytest
import torch
from registry import normal, roughen

import flowpath as fp


def test_is_the_dense_map() -> None:
    t = roughen(fp.LowRankAffine(5, rank=2).double(), 0.5)
    z = normal(4, 5)
    x, ladj = t.inverse(z)
    eye = torch.eye(5, dtype=torch.float64)
    u, v = t.stretch @ t.stretch.T, t.shrink @ t.shrink.T
    scale = torch.nn.functional.softplus(t.raw + torch.tensor(1.0).double().expm1().log())
    dense = scale.diag() @ (eye + u) @ torch.linalg.inv(eye + v)
    assert torch.allclose(x, t.shift + z @ dense.T, atol=1e-10)
    assert torch.allclose(ladj, torch.linalg.slogdet(dense).logabsdet.expand(4), atol=1e-10)


def test_start_is_no_stationary_point() -> None:
    """A product U U^T that starts at U = 0 would never leave it."""
    t = fp.LowRankAffine(6, rank=2).double()
    x, _ = t.inverse(normal(3, 6))
    assert torch.allclose(x, normal(3, 6), atol=1e-12)
    x.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 1e-3 for p in (t.stretch, t.shrink, t.raw))


def test_thousands_of_features_stay_cheap() -> None:
    t = fp.LowRankAffine(20_000, rank=4)
    assert sum(p.numel() for p in t.parameters()) == 20_000 * (2 + 2 * 4)
    x, ladj = t.inverse(torch.randn(2, 20_000))
    z, back = t(x)
    assert torch.allclose(ladj, -back, atol=1e-2) and z.shape == (2, 20_000)


def test_rank_is_bounded() -> None:
    with pytest.raises(ValueError, match=r"at most 3 \(features\), got 4"):
        fp.LowRankAffine(3, rank=4)


@pytest.mark.parametrize("make", [fp.TriangularAffine, lambda d: roughen(fp.LowRankAffine(d, rank=2))])
def test_set_to_a_location_and_scales(make: object) -> None:
    t = make(3).double()  # type: ignore[operator]
    shift, scale = torch.tensor([1.0, -2.0, 1e3]).double(), torch.tensor([1e-3, 0.5, 40.0]).double()
    assert t.set_to(shift, scale) is t
    z = normal(4, 3)
    assert torch.allclose(t.inverse(z)[0], shift + scale * z, atol=1e-9)


def test_set_to_a_matrix() -> None:
    t = fp.TriangularAffine(3).double()
    lower = normal(3, 3).tril(-1) + torch.tensor([0.5, 2.0, 1.0]).double().diag()
    z = normal(4, 3)
    assert torch.allclose(t.set_to(torch.ones(3).double(), lower).inverse(z)[0], 1.0 + z @ lower.T, atol=1e-10)


def test_set_to_wants_free_parameters() -> None:
    with pytest.raises(ValueError, match="function of the context"):
        fp.TriangularAffine(2, context=1).set_to(torch.zeros(2), torch.ones(2))
