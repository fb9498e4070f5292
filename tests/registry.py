"""Every transform as a case: how to build it, data for it, and what it promises. A new transform is a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions import transforms as tt

import flowpath as fp
from flowpath.architectures import architectures as RECIPES
from flowpath.nets import PickedMLP, RowMLP

HIDDEN = (8,)
ARCHITECTURES = sorted(RECIPES)


@dataclass(frozen=True)
class Case:
    """A transform under test.

    build: makes it, as a user would.
    features: width of its data.
    context: width of its context.
    draw: n seeded rows of its domain; by default normal rows, mapped into its support.
    tolerance: relative error allowed in float64.
    promises: "identity", that it is the identity as built.
    lacks: names of properties that make no sense for it.
    """

    build: Callable[[], fp.Transform]
    features: int = 3
    context: int = 0
    draw: Callable[[int], Tensor] | None = None
    tolerance: float = 1e-9
    promises: frozenset[str] = frozenset({"identity"})
    lacks: tuple[str, ...] = ()

    def fresh(self) -> fp.Transform:
        """As built, in float64 and eval mode."""
        return self.build().double().eval()

    def ready(self, scale: float = 0.4) -> fp.Transform:
        """The same with parameters moved away from their start by seeded normal numbers."""
        return roughen(self.fresh(), scale)

    def x(self, n: int = 6) -> Tensor:
        return fp.testing.example(self.fresh(), n) if self.draw is None else self.draw(n)

    def c(self, n: int = 6) -> Tensor | None:
        return normal(n, self.context, seed=11) if self.context else None


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def roughen(module: nn.Module, scale: float = 0.4, seed: int = 5) -> nn.Module:
    """Add seeded N(0, scale^2) numbers to every parameter; zero-initialised nets would make tests vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
    return module


def amplify(module: nn.Module, factor: float) -> nn.Module:
    """Multiply the raw numbers that reach the Elements: the final layers of conditioners, and free params."""
    with torch.no_grad():
        for m in module.modules():
            final = getattr(m, "final", None)
            for p in (final.weight, final.bias) if isinstance(final, nn.Linear) else ():
                p *= factor
            if isinstance(m, fp.Elementwise) and m.conditioner is None:
                m.params *= factor
    return module


def angles(features: int) -> Callable[[int], Tensor]:
    return lambda n: (0.8 * normal(n, features, seed=3)).clamp(-3.0, 3.0)


def mlp(inputs: int, outputs: int, element: fp.Element, context: int = 0) -> nn.Module:
    return fp.MLP(
        inputs, outputs, num_params=element.num_params, context=context, hidden_features=HIDDEN, activation=nn.Tanh
    )


def made(features: int, element: fp.Element, context: int = 0, hidden: tuple[int, ...] = (8, 8)) -> nn.Module:
    return fp.MaskedMLP(
        features, num_params=element.num_params, context=context, hidden_features=hidden, activation=nn.Tanh
    )


ELEMENTS: dict[str, Callable[[], fp.Element]] = {
    "additive": fp.Additive,
    "affine": fp.Affine,
    "affine-bounded": lambda: fp.Affine(log_bound=2.0),
    "spline": lambda: fp.RationalQuadratic(4, bound=3.0),
    "sinh-arcsinh": fp.SinhArcsinh,
    "circular": lambda: fp.CircularRationalQuadratic(3),
}

ALTERNATING, HALVES, BACK = [False, True, False], [False, True, True], [True, True, False]


def coupling(mask: list[bool], e: fp.Element, context: int = 0, unconditional: bool = False) -> fp.Transform:
    kept, moved = mask.count(False), mask.count(True)
    more = fp.Elementwise(kept, e) if unconditional else None
    return fp.Coupling(mask, e, mlp(kept, moved, e, context), context=context, unconditional=more)


def autoregressive(e: fp.Element, order: list[int] | None = None, context: int = 0, features: int = 3) -> fp.Transform:
    return fp.MaskedAutoregressive(features, e, made(features, e, context), order=order, context=context)


def residual(e: fp.Element) -> fp.Transform:
    net = fp.ResidualMLP(2, 1, num_params=e.num_params, hidden_features=6, blocks=1, activation=nn.Tanh)
    return fp.Coupling([True, False, False], e, net)


def gated(e: fp.Element, context: int = 0) -> fp.Transform:
    net = fp.GatedMLP(2, 1, num_params=e.num_params, context=context, hidden_features=6)
    return fp.Coupling([True, False, False], e, net, context=context)


def rows_of_a_plate(e: fp.Element) -> fp.Transform:
    """Two rows of a plate given their two mates and a global feature."""
    net = RowMLP(3, [[1, 2]], [0], 2, num_params=e.num_params, hidden_features=4)
    return fp.Coupling([False, False, False, True, True], e, net)


def picked(e: fp.Element) -> fp.Transform:
    net = PickedMLP(2, [1], 1, num_params=e.num_params, hidden_features=6)
    return fp.Coupling([False, False, True], e, net)


def foreign(e: fp.Element) -> fp.Transform:
    """A coupling whose conditioner is somebody else's module."""
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, e.num_params))
    return fp.Coupling([True, False, False], e, fp.ParamsLast(net, num_params=e.num_params))


# name -> (build it around an element, width of its context)
STRUCTURES: dict[str, tuple[Callable[[fp.Element], fp.Transform], int]] = {
    "elementwise": (lambda e: fp.Elementwise(3, e), 0),
    "elementwise-context": (lambda e: fp.Elementwise(3, e, mlp(2, 3, e), context=2), 2),
    "coupling-alternating": (lambda e: coupling(ALTERNATING, e), 0),
    "coupling-halves": (lambda e: coupling(HALVES, e), 0),
    "coupling-back-context": (lambda e: coupling(BACK, e, 2), 2),
    "coupling-unconditional": (lambda e: coupling(ALTERNATING, e, unconditional=True), 0),
    "coupling-unconditional-halves": (lambda e: coupling(HALVES, e, unconditional=True), 0),
    "autoregressive": (lambda e: autoregressive(e), 0),
    "autoregressive-order": (lambda e: autoregressive(e, [2, 0, 1]), 0),
    "autoregressive-context": (lambda e: autoregressive(e, [1, 0, 2], 2), 2),
}


def structured() -> Iterator[tuple[str, Case]]:
    for structure, (build, context) in STRUCTURES.items():
        for name, element in ELEMENTS.items():
            draw = angles(3) if name == "circular" else None

            def make(build=build, element=element) -> fp.Transform:
                return build(element())

            yield f"{structure}/{name}", Case(make, context=context, draw=draw)


NOTHING = frozenset[str]()
SIMPLEX = ("first_derivatives", "second_derivatives")  # a finite difference steps off the simplex


def supports() -> Iterator[tuple[str, Case]]:
    c = constraints
    on: dict[str, c.Constraint] = {
        "positive": c.positive,
        "interval": c.interval(-1.0, torch.tensor(2.0)),
        "interval-each": c.independent(c.interval(torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])), 1),
        "greater-than": c.greater_than(2.0),
        "less-than": c.less_than(torch.tensor(-1.0)),
        "ordered": pyro_constraints.ordered_vector,
        "simplex": c.simplex,
    }
    for name, constraint in on.items():
        lacks = SIMPLEX if name == "simplex" else ()
        yield (
            f"from-torch/{name}",
            Case(lambda k=constraint: fp.from_torch(biject_to(k)), promises=NOTHING, lacks=lacks),
        )
    both = tt.ComposeTransform([tt.AffineTransform(torch.tensor([1.0, 2.0, 3.0]), 2.0), tt.ExpTransform()])
    yield "from-torch/composed", Case(lambda: fp.from_torch(both), promises=NOTHING)
    real = tt.AffineTransform(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -2.0, 0.5]))
    yield "from-torch/affine", Case(lambda: fp.from_torch(real), promises=NOTHING)


def set_to(mode: str) -> fp.Transform:
    """A Whiten of given numbers instead of data."""
    scale = torch.tensor([[2.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-0.3, 0.2, 0.1]], dtype=torch.float64)
    loc = torch.tensor([1.0, -2.0, 30.0], dtype=torch.float64)
    return fp.Whiten(3, mode).set_to(loc, scale if mode == "full" else scale.diagonal())  # type: ignore[arg-type]


def set_from_data(t: fp.Transform) -> fp.Transform:
    mixed = normal(50, 3) @ torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.1, 0.0, 0.2]], dtype=torch.float64)
    return t.set_from(mixed + 3.0)  # type: ignore[operator]


def singles() -> Iterator[tuple[str, Case]]:
    yield "lu", Case(lambda: fp.LU(3))
    yield "lu-no-bias", Case(lambda: fp.LU(3, bias=False))
    yield "lu-1", Case(lambda: fp.LU(1), features=1)
    yield "householder", Case(lambda: fp.Householder(3))
    yield "householder-2", Case(lambda: fp.Householder(3, reflections=2))
    yield "permutation-reverse", Case(lambda: fp.Permutation.reverse(3), promises=NOTHING)
    yield "permutation-random", Case(lambda: fp.Permutation.random(3, seed=1), promises=NOTHING)
    yield "permutation-given", Case(lambda: fp.Permutation([1, 2, 0]), promises=NOTHING)
    yield "triangular", Case(lambda: fp.TriangularAffine(3))
    yield "triangular-1", Case(lambda: fp.TriangularAffine(1), features=1)
    yield "triangular-context", Case(lambda: fp.TriangularAffine(3, context=2, hidden_features=HIDDEN), context=2)
    yield "low-rank", Case(lambda: fp.LowRankAffine(3, rank=2))
    yield "low-rank-1", Case(lambda: fp.LowRankAffine(1, rank=1), features=1)
    yield "low-rank-wide", Case(lambda: fp.LowRankAffine(12, rank=3), features=12)
    yield "whiten-unset", Case(lambda: fp.Whiten(3))
    yield "whiten-diagonal", Case(lambda: set_from_data(fp.Whiten(3)), promises=NOTHING)
    yield "whiten-full", Case(lambda: set_from_data(fp.Whiten(3, "full")), promises=NOTHING)
    yield "whiten-diagonal-given", Case(lambda: set_to("diagonal"), promises=NOTHING)
    yield "whiten-full-given", Case(lambda: set_to("full"), promises=NOTHING)
    yield "actnorm-unset", Case(lambda: fp.ActNorm(3))
    yield "actnorm", Case(lambda: set_from_data(fp.ActNorm(3).double()), promises=NOTHING)
    yield "coupling-residual", Case(lambda: residual(fp.Affine()))
    yield "coupling-gated", Case(lambda: gated(fp.Affine()))
    yield "coupling-gated-context", Case(lambda: gated(fp.Affine(), 2), context=2)
    yield "coupling-rows", Case(lambda: rows_of_a_plate(fp.Affine()), features=5)
    yield "coupling-picked", Case(lambda: picked(fp.Affine()))
    yield "coupling-foreign", Case(lambda: foreign(fp.Affine()), promises=NOTHING)
    yield "autoregressive-1", Case(lambda: autoregressive(fp.Affine(), features=1), features=1)
    yield "autoregressive-20", Case(lambda: autoregressive(fp.Affine(log_bound=0.5), features=20), features=20)
    yield "inverse", Case(lambda: fp.Inverse(fp.LU(3)))
    yield "inverse-autoregressive", Case(lambda: fp.Inverse(autoregressive(fp.Affine(), [1, 2, 0], 2)), context=2)
    yield "inverse-twice", Case(lambda: fp.Inverse(fp.Inverse(coupling(HALVES, fp.Affine()))))
    yield "inverse-positive", Case(lambda: fp.Inverse(fp.from_torch(tt.ExpTransform())), promises=NOTHING)
    yield "chain", Case(lambda: fp.Chain([fp.ActNorm(3), coupling(HALVES, fp.Affine(), 2), fp.LU(3)]), context=2)
    yield (
        "chain-nested",
        Case(
            lambda: fp.Chain(
                [fp.Chain([autoregressive(fp.Affine())]), fp.Inverse(fp.Chain([fp.LU(3), fp.Householder(3)]))]
            )
        ),
    )
    yield (
        "chain-simplex",
        Case(
            lambda: fp.Chain([fp.from_torch(tt.StickBreakingTransform()), fp.TriangularAffine(2)]),
            promises=NOTHING,
            lacks=SIMPLEX,
        ),
    )


def architectures() -> Iterator[tuple[str, Case]]:
    for name in ARCHITECTURES:
        for features in (1, 2, 5):
            for context in (0, 2):
                yield (
                    f"{name}-{features}{'-context' if context else ''}",
                    Case(
                        lambda name=name, f=features, c=context: small_flow(name, f, c).transform,
                        features=features,
                        context=context,
                        promises=NOTHING,
                        tolerance=1e-8,
                    ),
                )


def small_flow(name: str, features: int = 3, context: int = 0, **options: object) -> fp.Flow:
    """An architecture as small as it gets, with a smooth activation."""
    options = {"hidden_features": HIDDEN, **options}
    if name != "gaussian":
        options = {"transforms": 2, "activation": nn.Tanh, **options}
    if name.startswith("nsf"):
        options = {"bins": 3, "bound": 4.0, **options}
    return RECIPES[name](features, context, **options)


def rough_flow(name: str, features: int = 3, context: int = 0, **options: object) -> fp.Flow:
    """`small_flow` in float64 with rough parameters, in eval mode."""
    return roughen(small_flow(name, features, context, **options).double().eval())  # type: ignore[return-value]


CASES: dict[str, Case] = dict([*singles(), *structured(), *supports(), *architectures()])

each_case = pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items()])
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


each_property = pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(p, c, id=f"{p}-{n}") for p in fp.testing.properties for n, c in CASES.items() if p not in c.lacks],
)


def cases_that(promise: str) -> pytest.MarkDecorator:
    """Parametrize over the cases with a promise."""
    return pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if promise in c.promises])
