"""What a user may get wrong, each with the words that tell: inputs, contexts, constructors. And conftest's guard."""

from __future__ import annotations

import random
from collections.abc import Callable

import conftest
import numpy as np
import pyro
import pytest
import torch
from registry import ARCHITECTURES, HIDDEN, each_architecture, rough_flow, small_flow
from torch import distributions as td
from torch import nn

import flowpath as fp
from flowpath.distribution import as_shape

# --- x and context of a call -------------------------------------------------------------------------------------


def flow32() -> fp.Flow:
    return small_flow("nsf", 3)


def conditional() -> fp.Flow:
    return small_flow("nsf", 3, 2)


X = torch.zeros(4, 3)
C = torch.zeros(4, 2)

# id -> (call, kind of error, words)
CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "features": (
        lambda: flow32().log_prob(torch.zeros(4, 2)),
        ValueError,
        "Flow expects x with 3 features, got shape (4, 2)",
    ),
    "no-features": (
        lambda: flow32().log_prob(torch.tensor(1.0)),
        ValueError,
        "Flow expects x with 3 features, got shape ()",
    ),
    "integers": (
        lambda: flow32().log_prob(torch.zeros(4, 3, dtype=torch.long)),
        TypeError,
        "Flow expects x of a floating dtype, got torch.int64; convert it with x.float()",
    ),
    "array": (
        lambda: flow32().log_prob(np.zeros((4, 3))),
        TypeError,
        "Flow expects x to be a tensor, got ndarray; use torch.as_tensor",
    ),
    "list": (lambda: flow32().log_prob([[0.0, 0.0, 0.0]]), TypeError, "Flow expects x to be a tensor, got list"),
    "float64": (
        lambda: flow32().log_prob(X.double()),
        TypeError,
        "Flow holds torch.float32 numbers, got x of torch.float64; convert x with .to(torch.float32), or the module",
    ),
    "float32": (
        lambda: flow32().double().log_prob(X),
        TypeError,
        "Flow holds torch.float64 numbers, got x of torch.float32",
    ),
    "device": (
        lambda: flow32().log_prob(X.to("meta")),
        ValueError,
        "Flow is on cpu, got x on meta; move one with .to(...)",
    ),
    "device-of-flow": (lambda: flow32().to("meta").log_prob(X), ValueError, "Flow is on meta, got x on cpu"),
    "to-noise": (
        lambda: flow32().to_noise(torch.zeros(2)),
        ValueError,
        "Flow expects x with 3 features, got shape (2,)",
    ),
    "to-data": (lambda: flow32().to_data(torch.zeros(2)), ValueError, "Flow expects z with 3 features, got shape (2,)"),
    "trace": (lambda: flow32().trace(torch.zeros(2)), ValueError, "Flow expects x with 3 features, got shape (2,)"),
    "context-missing": (
        lambda: conditional().log_prob(X),
        ValueError,
        "Flow expects a context with 2 features, got none; pass context=",
    ),
    "context-missing-in-sample": (
        lambda: conditional().sample(3),
        ValueError,
        "Flow expects a context with 2 features, got none; pass context=",
    ),
    "context-missing-in-call": (
        lambda: conditional()(),
        ValueError,
        "Flow expects a context with 2 features, got none; pass flow(context)",
    ),
    "context-superfluous": (
        lambda: flow32().log_prob(X, C),
        ValueError,
        "Flow takes no context, got one of shape (4, 2); build it with context=",
    ),
    "context-superfluous-in-sample": (lambda: flow32().sample(3, C), ValueError, "Flow takes no context"),
    "context-superfluous-in-call": (lambda: flow32()(C).rsample(), ValueError, "Flow takes no context"),
    "context-narrow": (
        lambda: conditional().log_prob(X, C[:, :1]),
        ValueError,
        "Flow expects a context with 2 features, got shape (4, 1)",
    ),
    "context-wide": (
        lambda: conditional().sample(2, torch.zeros(4, 3)),
        ValueError,
        "Flow expects a context with 2 features, got shape (4, 3)",
    ),
    "context-number": (
        lambda: conditional().log_prob(X, torch.tensor(1.0)),
        ValueError,
        "Flow expects a context with 2 features, got shape ()",
    ),
    "context-list": (
        lambda: conditional().log_prob(X, [[0.0, 0.0]]),
        TypeError,
        "Flow expects the context to be a tensor, got list; use torch.as_tensor",
    ),
    "context-list-in-call": (
        lambda: conditional()([[0.0, 0.0]]),
        TypeError,
        "Flow expects the context to be a tensor, got list; use torch.as_tensor",
    ),
    "context-array-without-embedding": (
        lambda: small_flow("maf", 3, 2, whiten="none").log_prob(X, np.zeros((4, 2))),
        TypeError,
        "Flow expects the context to be a tensor, got ndarray",
    ),
    "context-integers": (
        lambda: conditional().log_prob(X, C.long()),
        TypeError,
        "Flow holds torch.float32 numbers, got context of torch.int64; convert context with .to(torch.float32)",
    ),
    "context-float64": (
        lambda: conditional().log_prob(X, C.double()),
        TypeError,
        "Flow holds torch.float32 numbers, got context of torch.float64",
    ),
    "context-device": (
        lambda: conditional().log_prob(X, C.to("meta")),
        ValueError,
        "Flow is on cpu, got context on meta",
    ),
    "batches": (
        lambda: conditional().log_prob(X, torch.zeros(3, 2)),
        ValueError,
        "Flow: the batch shapes of x (4,) and context (3,) do not broadcast",
    ),
    "noise-shape": (
        lambda: flow32().sample(4, noise=torch.zeros(3, 3)),
        ValueError,
        "Flow expects noise of shape (4, 3), got (3, 3)",
    ),
    "noise-dtype": (
        lambda: flow32().sample(4, noise=torch.zeros(4, 3, dtype=torch.float64)),
        TypeError,
        "Flow holds torch.float32 numbers, got noise of torch.float64",
    ),
    "noise-for-a-base-without": (
        lambda: fp.Flow(fp.LU(3), fp.StudentT(3)).sample(4, noise=torch.zeros(4, 3)),
        ValueError,
        "StudentT is no fixed map of noise; draw from it without noise=",
    ),
    "count-negative": (lambda: flow32().sample(-1), ValueError, "num_samples expects counts of at least 0, got (-1,)"),
    "count-fraction": (lambda: flow32().sample(2.5), TypeError, "num_samples expects a count or a shape, got 2.5"),
    "count-text": (lambda: flow32().sample("3"), TypeError, "num_samples expects a count or a shape, got '3'"),
    "transform-features": (
        lambda: fp.LU(3)(torch.zeros(4, 2)),
        ValueError,
        "LU expects x with 3 features, got shape (4, 2)",
    ),
    "transform-inverse": (
        lambda: fp.LU(3).inverse(torch.zeros(4, 2)),
        ValueError,
        "LU expects z with 3 features, got shape (4, 2)",
    ),
    "transform-array": (lambda: fp.LU(3)(np.zeros((4, 3))), TypeError, "LU expects x to be a tensor, got ndarray"),
    "actnorm-one-row": (
        lambda: fp.ActNorm(3)(torch.zeros(1, 3)),
        ValueError,
        "ActNorm takes its scale from its first training batch: expected 2 rows, got 1",
    ),
    "whiten-one-row": (
        lambda: fp.Whiten(3).set_from(X[:1]),
        ValueError,
        "Whiten.set_from expects at least 2 rows, got 1",
    ),
    "whiten-given-shape": (
        lambda: fp.Whiten(3).set_to(torch.zeros(3), torch.eye(3)),
        ValueError,
        "Whiten.set_to expects loc (3,) and scale (3,), got (3,) and (3, 3)",
    ),
    "whiten-given-scale": (
        lambda: fp.Whiten(2, "full").set_to(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.5, -1.0]])),
        ValueError,
        "Whiten.set_to expects a finite loc and a scale that is finite and positive, got",
    ),
    "whiten-constant": (
        lambda: fp.Whiten(3).set_from(X),
        ValueError,
        "Whiten.set_from: columns [0, 1, 2] are constant",
    ),
    "whiten-duplicate": (
        lambda: fp.Whiten(2, "full").set_from(torch.randn(20, 1).expand(20, 2)),
        ValueError,
        "Whiten.set_from: column 1 is, to rounding, a linear function of the columns before it (a duplicate?); "
        'drop it, or use mode="diagonal"',
    ),
    "spline-params": (
        lambda: fp.RationalQuadratic(4).forward(X, torch.zeros(4, 3, 11)),
        ValueError,
        "RationalQuadratic expects params of shape (11, *batch, d), parameter axis first",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_input(name: str) -> None:
    call, kind, words = CALLS[name]
    with pytest.raises(kind) as error:
        call()
    assert words in str(error.value)


@each_architecture
def test_bad_input_is_refused_by_every_architecture(name: str) -> None:
    flow = rough_flow(name, context=2)
    with pytest.raises(ValueError, match="Flow expects x with 3 features, got shape \\(4, 4\\)"):
        flow.log_prob(torch.zeros(4, 4, dtype=torch.float64), C.double())
    with pytest.raises(ValueError, match="Flow expects a context with 2 features, got shape \\(4, 5\\)"):
        flow.log_prob(X.double(), torch.zeros(4, 5, dtype=torch.float64))


def test_a_nan_row_is_its_own_trouble() -> None:
    flow, x = rough_flow("nsf_autoregressive"), torch.zeros(4, 3, dtype=torch.float64)
    x[1, 2] = torch.nan
    assert flow.log_prob(x).isnan().tolist() == [False, True, False, False]


# --- constructors ------------------------------------------------------------------------------------------------

e = fp.Affine()
net = fp.MLP(1, 2, num_params=2, hidden_features=HIDDEN)

# id -> (build, kind of error, words)
BUILDS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "lu": (lambda: fp.LU(0), ValueError, "LU expects features to be a whole number of at least 1, got 0"),
    "lu-float": (lambda: fp.LU(2.0), ValueError, "LU expects features to be a whole number of at least 1, got 2.0"),
    "lu-bool": (lambda: fp.LU(True), ValueError, "LU expects features to be a whole number of at least 1, got True"),
    "actnorm": (lambda: fp.ActNorm(-1), ValueError, "ActNorm expects features to be a whole number"),
    "whiten": (lambda: fp.Whiten(0), ValueError, "Whiten expects features to be a whole number"),
    "whiten-mode": (lambda: fp.Whiten(2, "pca"), ValueError, 'Whiten expects mode "diagonal" or "full", got \'pca\''),
    "householder": (lambda: fp.Householder(0), ValueError, "Householder expects features to be a whole number"),
    "householder-odd": (
        lambda: fp.Householder(3, 3),
        ValueError,
        "Householder expects an even number of reflections, got 3",
    ),
    "householder-none": (
        lambda: fp.Householder(3, 0),
        ValueError,
        "Householder expects reflections to be a whole number",
    ),
    "permutation": (
        lambda: fp.Permutation([0, 2]),
        ValueError,
        "Permutation expects an order of 0 to d - 1, got [0, 2]",
    ),
    "permutation-twice": (lambda: fp.Permutation([0, 0]), ValueError, "Permutation expects an order"),
    "permutation-empty": (lambda: fp.Permutation([]), ValueError, "Permutation expects"),
    "permutation-reverse": (lambda: fp.Permutation.reverse(0), ValueError, "Permutation.reverse expects features"),
    "permutation-random": (lambda: fp.Permutation.random(0), ValueError, "Permutation.random expects features"),
    "triangular": (
        lambda: fp.TriangularAffine(0),
        ValueError,
        "TriangularAffine expects features to be a whole number",
    ),
    "triangular-context": (
        lambda: fp.TriangularAffine(2, context=-1),
        ValueError,
        "TriangularAffine expects context to be",
    ),
    "affine-floor": (lambda: fp.Affine(min_scale=0.0), ValueError, "Affine expects min_scale in (0, 1), got 0.0"),
    "affine-bound": (lambda: fp.Affine(log_bound=0.0), ValueError, "Affine expects log_bound > 0, got 0.0"),
    "spline-bins": (lambda: fp.RationalQuadratic(1), ValueError, "RationalQuadratic expects bins to be a whole number"),
    "spline-bound": (
        lambda: fp.RationalQuadratic(4, bound=0.0),
        ValueError,
        "RationalQuadratic expects an interval of finite, positive length",
    ),
    "spline-width": (lambda: fp.RationalQuadratic(4, min_width=0.3), ValueError, "min_width"),
    "spline-height": (lambda: fp.RationalQuadratic(4, min_height=0.3), ValueError, "min_height"),
    "spline-slope": (lambda: fp.RationalQuadratic(4, min_slope=2.0), ValueError, "min_slope"),
    "circular-period": (
        lambda: fp.CircularRationalQuadratic(4, period=-1.0),
        ValueError,
        "CircularRationalQuadratic expects an interval of finite, positive length",
    ),
    "elementwise": (lambda: fp.Elementwise(0, e), ValueError, "Elementwise expects features to be a whole number"),
    "elementwise-context": (
        lambda: fp.Elementwise(2, e, context=2),
        ValueError,
        "Elementwise expects a conditioner together with context > 0, or neither",
    ),
    "elementwise-net": (
        lambda: fp.Elementwise(2, e, net),
        ValueError,
        "Elementwise expects a conditioner together with",
    ),
    "elementwise-element": (lambda: fp.Elementwise(2, "affine"), TypeError, "Elementwise expects an Element, got str"),
    "coupling-mask": (
        lambda: fp.Coupling([True, True], e, net),
        ValueError,
        "Coupling expects a mask with both True and False, got [True, True]",
    ),
    "coupling-empty": (lambda: fp.Coupling([], e, net), ValueError, "Coupling expects a mask with both True and False"),
    "coupling-sizes": (
        lambda: fp.Coupling([True, False], e, net),
        ValueError,
        "Coupling: this mask expects a conditioner with out_features=1, got 2",
    ),
    "coupling-params": (
        lambda: fp.Coupling([True, True, False], fp.Additive(), net),
        ValueError,
        "Coupling: Additive expects 1 params a feature, MLP gives 2; build it with num_params=element.num_params",
    ),
    "coupling-context": (
        lambda: fp.Coupling([True, True, False], e, net, context=2),
        ValueError,
        "Coupling: this mask expects a conditioner with context=2, got 0",
    ),
    "coupling-unconditional": (
        lambda: fp.Coupling([True, True, False], e, net, unconditional=fp.Elementwise(2, e)),
        ValueError,
        "Coupling expects `unconditional` for 1 features, got",
    ),
    "coupling-element": (
        lambda: fp.Coupling([True, True, False], fp.LU(2), net),
        TypeError,
        "Coupling expects an Element, got LU",
    ),
    "autoregressive-order": (
        lambda: fp.MaskedAutoregressive(2, e, fp.MaskedMLP(2, num_params=2), order=[1, 1]),
        ValueError,
        "MaskedAutoregressive expects order to permute 0 to 1, got [1, 1]",
    ),
    "autoregressive-features": (
        lambda: fp.MaskedAutoregressive(3, e, fp.MaskedMLP(2, num_params=2)),
        ValueError,
        "MaskedAutoregressive expects a conditioner with features=3, got 2",
    ),
    "autoregressive-context": (
        lambda: fp.MaskedAutoregressive(2, e, fp.MaskedMLP(2, num_params=2, context=1)),
        ValueError,
        "MaskedAutoregressive expects a conditioner with context=0, got 1",
    ),
    "autoregressive-params": (
        lambda: fp.MaskedAutoregressive(2, e, fp.MaskedMLP(2, num_params=3)),
        ValueError,
        "MaskedAutoregressive: Affine expects 2 params a feature, MaskedMLP gives 3",
    ),
    "mlp-nothing": (lambda: fp.MLP(0, 2), ValueError, "MLP expects features or a context to look at, got neither"),
    "mlp-width": (
        lambda: fp.MLP(2, 2, hidden_features=(0,)),
        ValueError,
        "MLP expects each of hidden_features to be a whole number of at least 1, got 0",
    ),
    "mlp-dropout": (lambda: fp.MLP(2, 2, dropout=1.0), ValueError, "MLP expects dropout in [0, 1), got 1.0"),
    "mlp-params": (lambda: fp.MLP(2, 2, num_params=0), ValueError, "MLP expects num_params to be a whole number"),
    "gated-hidden": (
        lambda: fp.GatedMLP(2, 2, hidden_features=0),
        ValueError,
        "GatedMLP expects hidden_features to be a whole number of at least 1, got 0",
    ),
    "gated-nothing": (lambda: fp.GatedMLP(0, 2), ValueError, "GatedMLP expects in_features to be a whole number"),
    "residual-blocks": (lambda: fp.ResidualMLP(2, 2, blocks=0), ValueError, "ResidualMLP expects blocks to be a whole"),
    "residual-width": (
        lambda: fp.ResidualMLP(2, 2, hidden_features=(8, 8)),
        ValueError,
        "ResidualMLP expects each of hidden_features to be a whole number of at least 1, got (8, 8)",
    ),
    "masked-layers": (
        lambda: fp.MaskedMLP(2, hidden_features=()),
        ValueError,
        "MaskedMLP expects at least one hidden layer, got none",
    ),
    "masked-degrees": (
        lambda: fp.MaskedMLP(3, hidden_features=(2,), degrees=[[2, 1]]),
        ValueError,
        "MaskedMLP expects ascending degrees between 0 and 2, got [2, 1]",
    ),
    "masked-degree-count": (
        lambda: fp.MaskedMLP(3, hidden_features=(2,), degrees=[[1]]),
        ValueError,
        "MaskedMLP expects a degree for each unit, [2], got [1]",
    ),
    "params-last": (lambda: fp.ParamsLast(nn.Linear(1, 2), num_params=0), ValueError, "ParamsLast expects num_params"),
    "standardize": (lambda: fp.Standardize(0), ValueError, "Standardize expects features to be a whole number"),
    "chain-empty": (lambda: fp.Chain([]), ValueError, "Chain expects at least one transform, got none"),
    "chain-foreign": (
        lambda: fp.Chain([fp.LU(2), nn.Linear(2, 2)]),
        TypeError,
        "Chain expects Transforms, got Linear at 1; bring others in by fp.from_nflows or fp.from_torch",
    ),
    "chain-widths": (
        lambda: fp.Chain([fp.LU(2), fp.LU(3)]),
        ValueError,
        "Chain: transform 1 (LU) expects 3 features, but what comes before gives 2 features",
    ),
    "chain-contexts": (
        lambda: fp.Chain([fp.TriangularAffine(2, context=1), fp.TriangularAffine(2, context=2)]),
        ValueError,
        "Chain: its transforms expect contexts of different widths [1, 2]; give them one width",
    ),
    "inverse-foreign": (lambda: fp.Inverse(nn.Linear(2, 2)), TypeError, "Inverse expects a Transform, got Linear"),
    "from-torch": (
        lambda: fp.from_torch(fp.LU(2)),
        TypeError,
        "from_torch expects a torch.distributions Transform, got LU",
    ),
    "from-torch-many-to-one": (
        lambda: fp.from_torch(td.AbsTransform()),
        ValueError,
        "from_torch expects a bijective transform, got AbsTransform",
    ),
    "standard-normal": (
        lambda: fp.StandardNormal(0),
        ValueError,
        "StandardNormal expects features to be a whole number",
    ),
    "diagonal-normal": (lambda: fp.DiagonalNormal(2, context=-1), ValueError, "DiagonalNormal expects context to be"),
    "student": (lambda: fp.StudentT(2, df=1.0), ValueError, "StudentT expects df > 1, got 1.0"),
    "uniform": (
        lambda: fp.BoxUniform([0.0, 1.0], [1.0, 1.0]),
        ValueError,
        "BoxUniform expects corners of one width with high > low",
    ),
    "uniform-widths": (lambda: fp.BoxUniform([0.0], [1.0, 1.0]), ValueError, "BoxUniform expects corners of one width"),
    "mixture": (lambda: fp.NormalMixture(2, 0), ValueError, "NormalMixture expects components to be a whole number"),
    "flow-transform": (
        lambda: fp.Flow(nn.Linear(2, 2), fp.StandardNormal(2)),
        TypeError,
        "Flow expects a Transform, got Linear; see fp.from_nflows, fp.from_torch",
    ),
    "flow-base": (
        lambda: fp.Flow(fp.LU(2), nn.Linear(2, 2)),
        TypeError,
        "Flow expects a Base or a torch distribution, got Linear; wrap a module that returns a distribution as "
        "fp.ConditionalBase(module, features)",
    ),
    "flow-shapes": (
        lambda: fp.Flow(fp.LU(2), fp.StandardNormal(3)),
        ValueError,
        "Flow: the transform gives noise of shape (2,), the base has (3,)",
    ),
    "flow-contexts": (
        lambda: fp.Flow(fp.TriangularAffine(2, context=1), fp.DiagonalNormal(2, context=2)),
        ValueError,
        "Flow: transform and base expect contexts of different widths [1, 2]",
    ),
    "flow-batched-base": (
        lambda: fp.Flow(fp.LU(2), td.Normal(torch.zeros(2), 1.0)),
        ValueError,
        "wrap it as torch.distributions.Independent(d, 1)",
    ),
    "register-taken": (
        lambda: fp.register("LU")(type("Other", (fp.LU,), {"__qualname__": "Other"})),
        ValueError,
        "register: the name 'LU' belongs to LU; choose another",
    ),
    "whiten-word": (
        lambda: fp.maf(2, whiten="yes"),
        ValueError,
        'whiten expects "diagonal", "full" or "none", got \'yes\'',
    ),
}


@pytest.mark.parametrize("name", BUILDS)
def test_bad_construction(name: str) -> None:
    build, kind, words = BUILDS[name]
    with pytest.raises(kind) as error:
        build()
    assert words in str(error.value)


@each_architecture
@pytest.mark.parametrize("features", [0, -1, 2.0, "3", None])
def test_architectures_refuse_features_that_are_no_count(name: str, features: object) -> None:
    with pytest.raises(ValueError, match=f"{name} expects features to be a whole number of at least 1, got"):
        small_flow(name, features)  # type: ignore[arg-type]


@each_architecture
@pytest.mark.parametrize("context", [-1, 1.0, True])
def test_architectures_refuse_a_context_that_is_no_width(name: str, context: object) -> None:
    with pytest.raises(ValueError, match="expects context to be a whole number of at least 0, got"):
        small_flow(name, 2, context)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "gaussian"])
def test_architectures_refuse_no_transforms(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} expects transforms to be a whole number of at least 1, got 0"):
        small_flow(name, 2, transforms=0)


def test_abstract_parts_say_what_is_missing() -> None:
    with pytest.raises(TypeError, match="Transform must define _forward\\(x, context\\) -> \\(z, ladj\\)"):
        fp.Transform(2)(torch.zeros(2))
    with pytest.raises(TypeError, match="Transform must define _inverse\\(z, context\\) -> \\(x, ladj\\)"):
        fp.Transform(2).inverse(torch.zeros(2))
    with pytest.raises(TypeError, match="Base must define log_prob\\(z, context\\)"):
        fp.Base([2]).log_prob(torch.zeros(2))


@pytest.mark.parametrize("count", [3, (3,), [3], torch.Size([3]), np.int64(3), (np.int64(3),)], ids=repr)
def test_counts_and_shapes_are_one(count: object) -> None:
    assert as_shape(count) == (3,)  # type: ignore[arg-type]


# --- the guard of conftest.py ------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[], object]] = {
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's seed": lambda: torch.manual_seed(1),
    "torch's grad mode": lambda: torch.set_grad_enabled(False),
    "validation of distributions": lambda: td.Distribution.set_default_validate_args(
        not td.Distribution._validate_args
    ),
    "Pyro's parameters": lambda: pyro.param("left behind", torch.ones(())),
    "NumPy's generator": lambda: np.random.rand(),
    "Python's generator": lambda: random.random(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_guard_sees_a_change(name: str) -> None:
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        before = conftest.global_state()
        CHANGES[name]()
        after = conftest.global_state()
        conftest.restore(before)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    assert name in [line.split(":")[0] for line in conftest.changes(before, after)]
    assert conftest.changes(before, conftest.global_state()) == []


def test_guard_lets_draws_from_torch_pass() -> None:
    before = conftest.global_state()
    torch.randn(3)
    fp.nsf(2, hidden_features=HIDDEN).sample(2)
    assert conftest.changes(before, conftest.global_state()) == []
