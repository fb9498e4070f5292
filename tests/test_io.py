"""Saving and loading: what survives, and the message for what does not."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro import distributions as pyro_dist
from pyro.distributions.transforms import OrderedTransform
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributions as td
from torch import nn
from torch.distributions import constraints
from torch.distributions import transforms as tt

import flowpath as fp
from flowpath.architectures import architectures
from flowpath.io import storage


@fp.register("test-head")
class Head(nn.Module):
    """Context to a distribution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Linear(width, 2)

    def forward(self, c: torch.Tensor) -> td.Distribution:
        return td.Independent(td.Normal(self.net(c), 1.0), 1)


@fp.register("test-many")
class Many(fp.Transform):
    """Arguments of every kind."""

    context = None

    def __init__(self, *shifts: float, scale: Any = 1.0, **names: Any) -> None:
        super().__init__(2)
        self.shifts, self.scale, self.names = shifts, scale, names

    def _forward(self, x: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return x + sum(self.shifts), x.new_zeros(x.shape[:-1])


class Unknown(fp.Transform):
    context = None


def of(*layers: fp.Transform, base: Any = None, **options: Any) -> fp.Flow:
    return fp.Flow(fp.Chain(layers), base or fp.StandardNormal(2), **options)


def shared() -> fp.Flow:
    lu = fp.LU(2)
    return of(lu, fp.Permutation([1, 0]), lu)


def embedded() -> fp.Flow:
    net = nn.Sequential(fp.Standardize(3), nn.Linear(3, 4, bias=False), nn.GELU(approximate="tanh"), nn.LayerNorm(4))
    return of(fp.Elementwise(2, fp.Affine(), fp.MLP(4, 2, num_params=2), context=4), embedding=net)


def leaky(**options: Any) -> fp.Flow:
    return fp.nsf(2, transforms=2, hidden_features=(4,), activation=functools.partial(nn.LeakyReLU, 0.2), **options)


def from_torch(t: tt.Transform) -> Callable[[], fp.Flow]:
    return lambda: of(fp.from_torch(t), fp.LU(2))


small: dict[str, Any] = {"hidden_features": (4,)}
FLOWS: dict[str, Callable[[], fp.Flow]] = {
    **{f"{name}": functools.partial(build, 2, **small) for name, build in architectures.items()},
    **{f"{name} context": functools.partial(build, 2, 3, **small) for name, build in architectures.items()},
    "full": lambda: fp.maf(2, whiten="full", activation=nn.Tanh, **small),
    "one feature": lambda: fp.nsf(1, **small),
    "partial activation": leaky,
    "actnorm": lambda: of(fp.ActNorm(2), fp.Householder(2, 2)),
    "inverse": lambda: of(fp.Inverse(fp.TriangularAffine(2))),
    "spline": lambda: of(fp.Elementwise(2, fp.RationalQuadratic(4)), base=fp.BoxUniform(-5.0, 5.0, features=2)),
    "mixture": lambda: of(fp.LU(2), base=fp.NormalMixture(2, 3)),
    "student": lambda: of(fp.LU(2), base=fp.StudentT(2)),
    "generator": lambda: fp.Flow(fp.Chain(fp.LU(2) for _ in range(2)), fp.StandardNormal(2)),
    "shared": shared,
    "embedded": embedded,
    "torch base": lambda: of(fp.LU(2), base=td.MultivariateNormal(torch.ones(2), 2 * torch.eye(2))),
    "pyro base": lambda: of(fp.LU(2), base=pyro_dist.Gamma(torch.ones(2), 3.0).to_event(1)),
    "conditional base": lambda: of(fp.LU(2), base=fp.ConditionalBase(Head(3), 2, context=3)),
    "positive": from_torch(td.biject_to(constraints.positive)),
    "interval": from_torch(td.biject_to(constraints.interval(-1.0, torch.tensor([2.0, 3.0])))),
    "ordered": from_torch(OrderedTransform()),
    "inverted": from_torch(tt.AffineTransform(1.0, torch.tensor([2.0, 3.0])).inv),
    "power": from_torch(tt.ComposeTransform([tt.SoftplusTransform(), tt.PowerTransform(torch.tensor(3.0))])),
    "columns": from_torch(tt.CatTransform([tt.ExpTransform(), tt.TanhTransform()], dim=-1, lengths=[1, 1])),
}


def points(flow: fp.Flow, n: int = 5) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A few of the flow's own draws, and their context."""
    like = flow.base.like
    width = flow.context or 0
    context = torch.randn(n, width, dtype=like.dtype) if width else None
    return flow.sample(() if width else n, context), context


@pytest.mark.parametrize("build", FLOWS.values(), ids=FLOWS)
def test_flow_comes_back(build: Callable[[], fp.Flow], tmp_path: Path) -> None:
    flow = build().eval()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    again = fp.load(fp.save(flow, tmp_path / "flow.safetensors"))
    x, context = points(flow)
    assert torch.equal(again.log_prob(x, context), flow.log_prob(x, context))


def test_double_flow_comes_back_double(tmp_path: Path) -> None:
    flow = leaky().double().eval()
    again = fp.load(fp.save(flow, tmp_path / "f.safetensors"))
    x = torch.randn(5, 2, dtype=torch.float64)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


def test_whitening_keeps_its_digits(tmp_path: Path) -> None:
    flow = fp.gaussian(2)
    flow.transform.transforms[0].set_from(2459000 + torch.randn(10, 2, dtype=torch.float64))
    whiten = fp.load(fp.save(flow, tmp_path / "f.safetensors")).transform.transforms[0]
    assert bool(whiten.is_set)
    assert torch.equal(whiten.loc, flow.transform.transforms[0].loc)


@pytest.mark.parametrize("waiting", [True, False], ids=["waiting", "set"])
def test_actnorm_remembers_whether_it_waits(waiting: bool, tmp_path: Path) -> None:
    flow = of(fp.ActNorm(2))
    if not waiting:
        flow.train().log_prob(torch.randn(9, 2))
    assert fp.load(fp.save(flow, tmp_path / "f.safetensors")).transform.transforms[0]._waiting is waiting


def test_shared_layers_stay_shared(tmp_path: Path) -> None:
    layers = fp.load(fp.save(shared(), tmp_path / "f.safetensors")).transform.transforms
    assert layers[0] is layers[2]


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    flow = of(fp.LU(2), fp.TriangularAffine(2))
    flow.transform.transforms[0].requires_grad_(False)
    again = fp.load(fp.save(flow, tmp_path / "f.safetensors"))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in flow.parameters()]


def test_arguments_of_every_kind_come_back(tmp_path: Path) -> None:
    held = (1, 2.5, float("inf"), "a", None, True, [1, (2,)], {"k": torch.arange(3)}, torch.float64, nn.ReLU, Head)
    t = Many(1.0, 2.0, scale=held, other=3)
    again = fp.load(fp.save(of(t, fp.LU(2)), tmp_path / "f.safetensors")).transform.transforms[0]
    assert again.shifts == (1.0, 2.0) and again.names == {"other": 3}
    assert str(again.scale) == str(held)


def test_loaded_flow_is_in_eval_mode(tmp_path: Path) -> None:
    assert not fp.load(fp.save(leaky().train(), tmp_path / "f.safetensors")).training


def test_random_numbers_are_left_alone(tmp_path: Path) -> None:
    flow, before = leaky(), torch.get_rng_state()
    fp.load(fp.save(flow, tmp_path / "f.safetensors"))
    assert torch.equal(torch.get_rng_state(), before)


def test_folder_means_the_flow_in_it(tmp_path: Path) -> None:
    path = fp.save(leaky(), tmp_path)
    assert path == tmp_path / "flow.safetensors"
    assert isinstance(fp.load(tmp_path), fp.Flow)


def test_file_describes_itself(tmp_path: Path) -> None:
    path = fp.save(leaky(), tmp_path / "f.safetensors", training={"rows": 3})
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["flowpath"])
    assert config["versions"]["flowpath"] == fp.__version__
    assert config["training"] == {"rows": 3}
    assert config["flow"]["part"] == "Flow"


def test_defaults_are_written_out(tmp_path: Path) -> None:
    path = fp.save(of(fp.Elementwise(2, fp.Affine())), tmp_path / "f.safetensors")
    with safe_open(path, "pt") as file:
        assert '"min_scale": 0.001' in file.metadata()["flowpath"]


def test_file_from_a_gpu_loads_on_the_cpu(tmp_path: Path) -> None:
    path = fp.save(leaky(), tmp_path / "f.safetensors")
    assert next(fp.load(path, map_location="meta").parameters()).device.type == "meta"
    assert next(fp.load(path).parameters()).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flow_on_a_gpu_is_saved(tmp_path: Path) -> None:
    path = fp.save(leaky().to("cuda"), tmp_path / "f.safetensors")
    assert next(fp.load(path).parameters()).device.type == "cpu"


UNSAVEABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "no flow": (lambda: nn.Linear(2, 2), "save expects a Flow, got Linear"),
    "part": (lambda: of(Unknown(2)), r'flow.transform.transforms\[0\] is a Unknown, .*@fp.register\("Unknown"\)'),
    "function": (lambda: fp.nsf(2, activation=lambda: nn.ReLU()), "activation is a function, which no file can hold"),
    "class": (lambda: of(Many(scale=Unknown)), "scale is the class Unknown"),
    "torch transform": (lambda: of(Many(scale=tt.AbsTransform())), "AbsTransform, which flowpath cannot write"),
    "distribution": (lambda: of(Many(scale=type("Mine", (td.Normal,), {})(0.0, 1.0))), "is a Mine, which is not of"),
    "torch module": (lambda: of(Many(scale=nn.LSTM(2, 2)), fp.LU(2)), "scale is a LSTM"),
}


@pytest.mark.parametrize(("build", "message"), UNSAVEABLE.values(), ids=UNSAVEABLE)
def test_parts_no_file_can_hold_are_named(build: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        fp.save(build(), tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())


def test_part_exchanged_after_building_is_refused(tmp_path: Path) -> None:
    flow = of(fp.LU(2))
    flow.transform = fp.Chain([fp.TriangularAffine(2)])
    with pytest.raises(TypeError, match="no longer holds the transform it was built with"):
        fp.save(flow, tmp_path / "f.safetensors")


def test_part_added_after_building_is_refused(tmp_path: Path) -> None:
    flow = of(fp.LU(2))
    flow.transform.transforms.append(fp.LU(2))
    with pytest.raises(ValueError, match="cannot be built again .* nothing was written"):
        fp.save(flow, tmp_path / "f.safetensors")


def test_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fp.save(leaky(), tmp_path / "f.safetensors")
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "_flush", full)
    with pytest.raises(OSError, match="No space left"):
        fp.save(leaky(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def written(tmp_path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """A saved flow whose description or tensors were changed."""
    path = fp.save(leaky(), tmp_path / "f.safetensors")
    tensors, config = storage.read(path, "flowpath", "load")
    change(config, tensors)
    storage.write(path, tensors, "flowpath", config)
    return path


CHANGES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "newer": (lambda c, t: c.update(format=99), "in format 99, this version reads up to 1; upgrade"),
    "no format": (lambda c, t: c.pop("format"), "states no format version"),
    "no dtype": (lambda c, t: c.pop("dtype"), "description .* is damaged: no 'dtype'"),
    "unknown part": (lambda c, t: c["flow"].update(part="Flaw"), "holds a part 'Flaw' that is not registered .*'Flow'"),
    "unknown kind": (lambda c, t: c.update(flow={"eval": "1"}), "holds 'eval', which means nothing here"),
    "no flow": (lambda c, t: c.update(flow={"tuple": []}), "describes a tuple, not a Flow"),
    "arguments": (lambda c, t: c["flow"]["arguments"].update(depth=3), "builds a Flow from .* does not fit"),
    "lacking": (lambda c, t: t.pop(next(iter(t))), "lacks the tensor"),
    "unasked": (lambda c, t: t.update(extra=torch.zeros(1)), "holds, unasked, the tensor 'extra'"),
    "shape": (lambda c, t: t.update({next(iter(t)): torch.zeros(7, 7)}), r"of shape \(7, 7\), the flow .* expects"),
    "no module": (lambda c, t: c.update(flow={"module": "Parameter", "arguments": {}}), "no module of torch.nn"),
    "no such class": (lambda c, t: c.update(flow={"torch.nn": "Nope"}), "'Nope', which torch.nn does not have"),
    "no transform": (lambda c, t: c.update(flow={"transform": "eval", "arguments": {}}), "does not build"),
    "no argument": (lambda c, t: c.update(flow={"tensor": "argument/7"}), "names a tensor 'argument/7'"),
    "no distribution": (
        lambda c, t: c.update(
            flow={"distribution": "Transform", "space": "torch.distributions", "event_dims": 0, "arguments": {}}
        ),
        "no distribution",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_damaged_files_are_refused(change: Callable[[Any, Any], Any], message: str, tmp_path: Path) -> None:
    path = written(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        fp.load(path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = fp.save(leaky(), tmp_path / "f.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no safetensors file, or was cut short"):
        fp.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "other"])
def test_foreign_safetensors_are_refused(metadata: Any, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "f.safetensors", metadata)
    with pytest.raises(ValueError, match="not one that flowpath wrote"):
        fp.load(tmp_path / "f.safetensors")


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "f.pt")
    with pytest.raises(ValueError, match="is no safetensors file"):
        fp.load(tmp_path / "f.pt")


@pytest.mark.parametrize("text", ["{", "3"], ids=["syntax", "kind"])
def test_damaged_json_is_refused(text: str, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "f.safetensors", {"flowpath": text})
    with pytest.raises(ValueError, match="the description in .* is damaged"):
        fp.load(tmp_path / "f.safetensors")


def test_missing_file_lists_what_is_near(tmp_path: Path) -> None:
    fp.save(leaky(), tmp_path / "flow.safetensors")
    with pytest.raises(FileNotFoundError, match="no file flwo.safetensors .* there is flow.safetensors"):
        fp.load(tmp_path / "flwo.safetensors")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fp.load(tmp_path / "nowhere" / "flow.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX ones")
def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    fp.save(fp.gaussian(2), tmp_path / "flow.safetensors")
    assert (tmp_path / "flow.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
