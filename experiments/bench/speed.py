"""One run of the comparison: every case, every operation, eager and compiled, as records for the JSON."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import flowpath as fp
from experiments.bench.agreement import TOLERANCE, matched, worst_difference
from experiments.bench.cases import RSAMPLE, SAMPLE, TRAIN, VARIATIONAL, Case, operation
from experiments.bench.measure import ratios, side_by_side, spread
from experiments.bench.peers import LIBRARIES, Rival
from flowpath.tracing import trace
from flowpath.training.compiling import Runner

Record = dict[str, Any]
OURS, FUSED, COMPILED = "flowpath", "flowpath, fused Adam", "flowpath, compiled"
# nflows breaks its graph at every spline and gains little from compiling: two cases show it.
FEW = 8  # features up to which the way of drawing them one by one is compiled as a whole, not Element by Element
COMPILED_PEERS = {"small": ("nflows", "zuko"), "coupling D=43": ("nflows", "zuko")}


def rivals(case: Case, device: str) -> dict[str, Rival]:
    """The case's flow in every library that can build it, on the device."""
    torch.manual_seed(0)
    found = dict(zip((OURS, "nflows"), matched(case.kind, case.shape), strict=True))
    for name in LIBRARIES:
        if name not in found:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found[name] = LIBRARIES[name][case.kind](case.shape)
                    found[name].log_prob(torch.randn(2, case.shape.features))
                except Exception as error:  # a library that cannot build this flow is left out, and said so
                    print(f"  {case.name}: {name} left out: {type(error).__name__}: {error}")
                    found.pop(name, None)
    ours = found[OURS].parameters
    for name in [n for n, rival in found.items() if not 0.8 < rival.parameters / ours < 1.25]:
        print(f"  {case.name}: {name} left out, its flow is another one: {found.pop(name).parameters} parameters")
    for rival in found.values():
        rival.module.to(device)
    return found


def agreement(cases: Iterable[Case]) -> Record:
    """The worst difference from nflows with the same weights over all cases; refuses to go on past the tolerance."""
    worst = {case.name: worst_difference(case.kind, case.shape) for case in cases}
    if max(worst.values()) > TOLERANCE:
        raise SystemExit(f"flowpath and nflows differ with the same weights: {worst}")
    return {"tolerance": TOLERANCE, "worst": worst}


def eager(case: Case, device: str, **timing: Any) -> Iterator[Record]:
    """A record an operation, all libraries side by side; training with flowpath's own choice of Adam beside."""
    flows = rivals(case, device)
    counts = {name: rival.parameters for name, rival in flows.items()}
    for name in case.operations:
        works = {who: operation(rival, name, case, device, fused=False) for who, rival in flows.items()}
        if name in (TRAIN, VARIATIONAL):
            works[FUSED] = operation(flows[OURS], name, case, device, fused=True)
        works = {who: work for who, work in works.items() if _runs(who, case, name, work)}
        yield _record(case, name, "eager", side_by_side(works, device, **timing), counts)


def compiled(case: Case, device: str, **timing: Any) -> Iterator[Record]:
    """The same compiled, with fused Adam: flowpath's step as `fp.fit(compile=True)` runs it, the rest by torch.compile.

    Cold seconds, of the first two calls, beside. A peer's way to draw feature by feature is not compiled, as that would
    unroll it D times.
    """
    from torch._inductor import config  # not before it is needed: it is slow to import

    torch._logging.set_logs(dynamo=logging.CRITICAL)  # nflows breaks its graphs with pages of warnings
    config.compile_threads = 1  # in this process, so that its CPU time can be told
    config.force_disable_caches = True
    for name in case.compiled:
        flows = rivals(case, device)
        counts = {who: rival.parameters for who, rival in flows.items()}
        works = {who: operation(r, name, case, device, fused=False) for who, r in flows.items() if who != OURS}
        works = {who: work for who, work in works.items() if _runs(who, case, name, work)}
        cold = {}
        peers = () if name in (SAMPLE, RSAMPLE) else COMPILED_PEERS.get(case.name, ("zuko",))
        for who in [w for w in (OURS, *peers) if w in flows]:
            torch._dynamo.reset()
            work = _compiled_work(flows[who], who, name, case, device)
            begun = _all_seconds()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not _runs(f"{who}, compiled", case, name, work):
                    continue
                work()
            cold[f"{who}, compiled"] = _all_seconds() - begun
            works[f"{who}, compiled"] = work
        if COMPILED not in works:
            continue
        record = _record(case, name, "compiled", side_by_side(works, device, **timing), counts, COMPILED)
        yield record | {"cold_cpu_seconds": cold}
    torch._dynamo.reset()


def _compiled_work(rival: Rival, who: str, name: str, case: Case, device: str) -> Callable[[], object]:
    if who == OURS and name == TRAIN:
        runner = Runner(fp.MaximumLikelihood(rival.module), True, torch.device(device))  # type: ignore[arg-type]
        return operation(rival, name, case, device, fused=True, differentiate=runner)
    if who == OURS and name == SAMPLE and case.shape.features <= FEW:
        return _sampler(rival.module, case.size(name))  # type: ignore[arg-type]
    return operation(_compile(rival, name, who == OURS), name, case, device, fused=True)


def _sampler(flow: fp.Flow, rows: int) -> Callable[[], object]:
    """Draws from one graph of the flow's sample, compiled at the first call."""
    made: list[Callable[[list[Tensor]], list[Any]]] = []

    def sample() -> list[Any]:
        if not made:
            graph = trace(lambda: [flow.sample(rows)], [], live=flow.parameters())
            made.append(graph.compiled([]))
        return made[0]([])

    return sample


def _all_seconds() -> float:
    """CPU time of this process and of the compilers it called."""
    return sum(os.times()[:4])


def _compile(rival: Rival, name: str, ours: bool) -> Rival:
    """Compiled entry points. flowpath's sequential inverse is compiled Element by Element, which is what recurs."""
    if ours and name in (SAMPLE, RSAMPLE):
        element: Any = next(m for m in rival.module.modules() if hasattr(m, "num_params") and hasattr(m, "inverse"))
        plain, quick = element.features_first, torch.compile(element.features_first, dynamic=True)
        # Of a compiled graph torch takes one gradient; the implicit inverse takes several.
        element.features_first = lambda *args: (plain if torch.is_grad_enabled() else quick)(*args)
        return rival
    calls: tuple[Callable[..., Any], ...] = (rival.log_prob, rival.rsample, rival.rsample_and_log_prob)
    return Rival(rival.module, *(torch.compile(call) for call in calls))


def _runs(who: str, case: Case, name: str, work: Callable[[], object]) -> bool:
    try:
        work()
    except Exception as error:
        print(f"  {case.name}, {name}: {who} fails: {type(error).__name__}: {str(error)[:120]}")
        return False
    return True


def _record(
    case: Case, name: str, mode: str, times: dict[str, list[float]], counts: dict[str, int], ours: str = OURS
) -> Record:
    record = {
        "case": case.name,
        "operation": name,
        "mode": mode,
        "batch": case.size(name),
        "rounds": len(next(iter(times.values()))),
        "parameters": counts,
        "milliseconds": {who: spread([1e3 * s for s in values]) for who, values in times.items()},
        "ratios": ratios(times, ours),
    }
    if FUSED in times:
        record["ratios_fused"] = {k: v for k, v in ratios(times, FUSED).items() if k != OURS}
    shown = "  ".join(f"{who} {v['median']:.3g}" for who, v in record["milliseconds"].items())
    beside = "  ".join(
        f"{who} {v['median']:.2f} [{v['low']:.2f}, {v['high']:.2f}]" for who, v in record["ratios"].items()
    )
    print(f"{case.name}, {name}, {mode}: ms {shown}\n    ratio {beside}", flush=True)
    return record


def surroundings(device: str) -> Record:
    """Processor, CPU capability, threads and versions."""
    packages = ("torch", "nflows", "zuko", "normflows", "pyro-ppl", "numpy")
    return {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
