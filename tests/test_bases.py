"""Base distributions against torch's, closed forms and quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from registry import HIDDEN, normal, roughen
from torch import Tensor, nn
from torch import distributions as td

import flowpath as fp
from flowpath.foreign_bases import TorchBase


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, c: Tensor) -> td.Distribution:
        return td.Independent(td.Normal(self.net(c), 0.5), 1)


class Free(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))

    def forward(self) -> td.Distribution:
        return td.Independent(td.Laplace(self.loc, 1.0), 1)


BASES: dict[str, Callable[[], fp.Base]] = {
    "standard": lambda: fp.StandardNormal(3),
    "diagonal": lambda: fp.DiagonalNormal(3),
    "diagonal-context": lambda: fp.DiagonalNormal(3, context=2, hidden_features=HIDDEN),
    "student": lambda: fp.StudentT(3, df=4.0),
    "uniform": lambda: fp.BoxUniform(-1.0, 2.0, features=3),
    "mixture": lambda: fp.NormalMixture(3, 4),
    "torch": lambda: TorchBase(td.Independent(td.Gamma(torch.tensor([2.0, 3.0, 1.5]), torch.ones(3)), 1)),
    "module": lambda: fp.ConditionalBase(Free(), 3),
    "module-context": lambda: fp.ConditionalBase(Head(), 3, context=2),
}
each_base = pytest.mark.parametrize("name", BASES)


def built(name: str) -> fp.Base:
    return roughen(BASES[name]().double(), 0.3)  # type: ignore[return-value]


def context_for(base: fp.Base, *batch: int) -> Tensor | None:
    return normal(*batch, base.context) if base.context else None


@each_base
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
def test_draw_and_density_shapes(name: str, shape: tuple[int, ...]) -> None:
    base = built(name)
    c = context_for(base, *shape)
    z = base.rsample(shape, c)
    assert z.shape == (*shape, 3) and z.dtype == torch.float64
    assert base.log_prob(z, c).shape == shape


@each_base
def test_draws_lie_in_the_support(name: str) -> None:
    base = built(name)
    z = base.rsample((50,), context_for(base, 50))
    assert bool(base.support.check(z).all()) and bool(base.log_prob(z, context_for(base, 50)).isfinite().all())


@each_base
def test_has_rsample_says_whether_draws_carry_gradients(name: str) -> None:
    base = built(name)
    learns = any(p.requires_grad for p in base.parameters())
    assert base.rsample((2,), context_for(base, 2)).requires_grad is (base.has_rsample and learns)


@each_base
def test_generator_decides_the_draw(name: str, keeps_rng: Callable) -> None:
    base, one = built(name), generator(1)
    c = context_for(base, 4)
    with keeps_rng():
        a, more = base.rsample((4,), c, one), base.rsample((4,), c, one)
        b = base.rsample((4,), c, generator(1))
    assert torch.equal(a, b) and not torch.equal(a, more)


@pytest.mark.parametrize("name", ["standard", "diagonal", "diagonal-context", "uniform"])
def test_draw_is_a_fixed_map_of_noise(name: str) -> None:
    base = built(name)
    c = context_for(base, 4)
    noise = base.draw_noise((4,), generator(1))
    assert noise.shape == (4, *base.noise_shape)
    assert torch.equal(base.from_noise(noise, c), base.rsample((4,), c, generator(1)))


@pytest.mark.parametrize("name", ["student", "mixture", "torch", "module"])
def test_no_map_of_noise_is_refused_by_name(name: str) -> None:
    base = built(name)
    assert base.noise_shape is None
    for call in (lambda: base.draw_noise((4,)), lambda: base.from_noise(torch.zeros(4, 3))):
        with pytest.raises(ValueError, match=f"{type(base).__name__} is no fixed map of noise"):
            call()


@pytest.mark.parametrize("name", ["standard", "diagonal", "student", "mixture", "uniform"])
def test_mass_is_one(name: str) -> None:
    """A sum over a fine grid along one feature, of the one-feature version."""
    one = {
        "standard": lambda: fp.StandardNormal(1),
        "diagonal": lambda: fp.DiagonalNormal(1),
        "student": lambda: fp.StudentT(1),
        "mixture": lambda: fp.NormalMixture(1, 3),
        "uniform": lambda: fp.BoxUniform(-1.0, 2.0, features=1),
    }[name]
    base = roughen(one().double(), 0.3).requires_grad_(False)
    line = torch.linspace(-200, 200, 400_001, dtype=torch.float64)
    assert abs(float(base.log_prob(line.unsqueeze(-1)).exp().sum() * (line[1] - line[0])) - 1) < 1e-3


def test_standard_normal_against_torch() -> None:
    z = normal(5, 3)
    want = td.Normal(torch.zeros(3, dtype=torch.float64), 1.0).log_prob(z).sum(-1)
    assert torch.allclose(fp.StandardNormal(3).log_prob(z), want)


def test_diagonal_normal_against_torch() -> None:
    base, z = built("diagonal"), normal(5, 3)
    log_s, m = base.numbers
    assert torch.allclose(base.log_prob(z), td.Normal(m, log_s.exp()).log_prob(z).sum(-1))
    assert torch.allclose(base.from_noise(z), m + log_s.exp() * z)


@pytest.mark.parametrize("context", [0, 2])
def test_diagonal_normal_starts_standard(context: int) -> None:
    base, z = fp.DiagonalNormal(3, context=context).double(), normal(5, 3)
    c = normal(5, 2) if context else None
    assert torch.allclose(base.log_prob(z, c), fp.StandardNormal(3).log_prob(z))


def test_conditional_diagonal_normal_depends_on_its_context() -> None:
    base, c = built("diagonal-context"), normal(4, 2).requires_grad_()
    log_q = base.log_prob(normal(3), c)
    assert len(set(log_q.tolist())) == 4
    log_q.sum().backward()
    assert bool((c.grad != 0).all())


@pytest.mark.parametrize("df", [1.5, 4.0, 40.0])
def test_student_against_torch(df: float) -> None:
    base, z = fp.StudentT(3, df=df).double(), 3 * normal(5, 3)
    assert torch.allclose(base.df, torch.full((3,), df, dtype=torch.float64), rtol=1e-5)
    assert torch.allclose(base.log_prob(z), td.StudentT(base.df).log_prob(z).sum(-1))


def test_student_is_finite_far_out_in_float32() -> None:
    base, z = fp.StudentT(2, df=1.01), torch.tensor([[1e6, -1e6]], requires_grad=True)
    base.log_prob(z).sum().backward()
    assert bool(z.grad.isfinite().all())
    assert bool(base.rsample((10_000,)).isfinite().all())


def test_student_gradient_in_df() -> None:
    """d/d df of E log(1 + z^2), by the draws' implicit gradient and by quadrature of the density."""
    base = fp.StudentT(1, df=4.0).double()
    z = base.rsample((400_000,), generator=generator())
    terms = torch.log1p(z.square()).squeeze(-1)
    (got,) = torch.autograd.grad(terms.mean(), base.raw_df)
    line = torch.linspace(-3000, 3000, 1_200_001, dtype=torch.float64)

    def mean(raw: float) -> float:
        base.raw_df.data.fill_(raw)
        return float((base.log_prob(line.unsqueeze(-1)).exp() * torch.log1p(line.square())).sum() * (line[1] - line[0]))

    with torch.no_grad():
        raw = float(base.raw_df)
        want = (mean(raw + 1e-3) - mean(raw - 1e-3)) / 2e-3
    assert abs(float(got) - want) < 0.03 * abs(want)


def test_uniform_against_torch() -> None:
    base = fp.BoxUniform([0.0, -1.0], [2.0, 1.0]).double()
    inside = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(base.log_prob(inside), torch.full((2,), -math.log(4.0), dtype=torch.float64))
    assert base.log_prob(torch.tensor([1.0, 1.5])) == -math.inf
    assert base.log_prob(torch.tensor([1.0, math.nan])).isnan()


def test_uniform_draws_fill_the_box() -> None:
    z = fp.BoxUniform([0.0, -1.0], [2.0, 1.0]).rsample((4000,), generator=generator())
    assert torch.allclose(z.amin(0), torch.tensor([0.0, -1.0]), atol=0.01)
    assert torch.allclose(z.amax(0), torch.tensor([2.0, 1.0]), atol=0.01)


def test_mixture_against_torch() -> None:
    base, z = built("mixture"), normal(5, 3)
    parts = td.Independent(td.Normal(base.loc, base.log_scale.exp()), 1)
    want = td.MixtureSameFamily(td.Categorical(logits=base.logits), parts)
    assert torch.allclose(base.log_prob(z), want.log_prob(z))


def test_mixture_draws_have_its_mean_and_spread() -> None:
    base = built("mixture")
    z = base.rsample((40_000,), generator=generator())
    parts = td.Independent(td.Normal(base.loc, base.log_scale.exp()), 1)
    want = td.MixtureSameFamily(td.Categorical(logits=base.logits), parts)
    error = want.variance.sqrt() / 200
    assert bool(((z.mean(0) - want.mean).abs() < 4 * error).all())
    assert torch.allclose(z.var(0), want.variance, rtol=0.05)


def test_mixture_starts_the_same_everywhere(keeps_rng: Callable) -> None:
    with keeps_rng():
        a, b = fp.NormalMixture(3, 4), fp.NormalMixture(3, 4)
    assert torch.equal(a.loc, b.loc)


TORCH = {
    "normal": lambda: td.Independent(td.Normal(torch.zeros(3), torch.ones(3)), 1),
    "multivariate": lambda: td.MultivariateNormal(torch.zeros(3), covariance_matrix=torch.eye(3) + 0.3),
    "dirichlet": lambda: td.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
    "beta-like": lambda: td.Independent(td.Kumaraswamy(torch.ones(3), 2 * torch.ones(3)), 1),
    "laplace": lambda: td.Independent(td.Independent(td.Laplace(torch.zeros(3), torch.ones(3)), 0), 1),
}


@pytest.mark.parametrize("kind", TORCH)
def test_torch_distribution_as_a_base(kind: str) -> None:
    d = TORCH[kind]()
    base = TorchBase(d)
    z = d.sample((4,))
    assert torch.allclose(base.log_prob(z), d.log_prob(z))
    assert torch.equal(base.rsample((4,)) * 0, z * 0) and bool(base.support.check(base.rsample((4,))).all())
    assert base.double().rsample((4,)).dtype == torch.float64


def test_torch_base_keeps_its_parameters_as_buffers() -> None:
    loc = torch.zeros(3)
    base = TorchBase(td.Independent(td.Normal(loc, torch.ones(3)), 1))
    loc.add_(5.0)
    assert torch.equal(base.arg_loc, torch.zeros(3)) and not list(base.parameters())
    assert {"arg_loc", "arg_scale"} <= set(base.state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: td.Normal(torch.zeros(3), 1.0), "wrap it as torch.distributions.Independent"),
        (lambda: td.Normal(0.0, 1.0), "has batch shape \\(\\) and event shape \\(\\)"),
        (lambda: TORCH["normal"]().expand((2,)), "has batch shape \\(2,\\)"),
        (
            lambda: td.MixtureSameFamily(td.Categorical(torch.ones(2)), TORCH["normal"]().expand((2,))),
            "cannot rebuild a MixtureSameFamily .* pass fp.ConditionalBase",
        ),
        (
            lambda: td.TransformedDistribution(TORCH["normal"](), [td.ExpTransform()]),
            "cannot rebuild a TransformedDistribution .* pass fp.ConditionalBase",
        ),
    ],
    ids=["batch", "scalar", "expanded", "mixture", "transformed"],
)
def test_torch_distributions_that_are_refused(make: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TorchBase(make())


def test_module_base_is_trained_by_the_density_and_by_draws() -> None:
    base = BASES["module-context"]().double()
    base.log_prob(normal(4, 3), normal(4, 2)).sum().backward()
    assert base.module.net.weight.grad is not None
    base.zero_grad()
    base.rsample((4,), normal(4, 2)).sum().backward()
    assert bool((base.module.net.weight.grad != 0).any())
