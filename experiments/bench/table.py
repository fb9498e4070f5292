"""The tables of docs/speed.md, written from the saved JSON.

    python -m experiments.bench.table [--check]

Each table stands between `<!-- bench: NAME -->` and `<!-- end -->`. `--check` writes nothing and fails where the page
and the results differ.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from experiments.bench.targets import COLUMNS, ELSEWHERE, LEAST, TARGETS, Target, fused, reached, slower

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "speed.md"
_BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def runs(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The saved runs by CPU capability."""
    return {
        p.stem.removeprefix("speed-"): json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("speed-*.json"))
    }


def targets() -> Iterator[str]:
    """Every target, what was measured, and whether it holds."""
    found = runs()
    yield "| case | beside | eager, AVX-512 | eager, AVX2 | compiled, fused Adam |"
    yield "|---|---|---|---|---|"
    for target in TARGETS:
        measured = [_of_svi(c) if target.case == ELSEWHERE else reached(target, c, found) for c in COLUMNS]
        limits = [getattr(target, c) for c in COLUMNS]
        beside = [_beside(target, c, found) for c in COLUMNS]
        cells = [_cell(*each) for each in zip(limits, measured, beside, strict=True)]
        yield f"| {target.claim} | {target.peer} | {' | '.join(cells)} |"


def _beside(target: Target, column: str, found: dict[str, dict[str, Any]]) -> str:
    """What flowpath's own ways of training reach: fused Adam, and a step as one graph."""
    adam, graph = fused(target, column, found), None
    if target.operation == "train" and target.peer == "nflows" and column != "compiled":
        graph = next((r["ratios"]["nflows"]["median"] for r in _graphs(column) if r["case"] == target.case), None)
    shown = (("fused Adam", adam), ("one graph", graph))
    return "".join(f"; {name} {ratio:.2f}" for name, ratio in shown if ratio is not None)


@cache
def _graphs(capability: str) -> list[dict[str, Any]]:
    """The records of `fit_step` with a CPU capability."""
    return json.loads((RESULTS / f"fit_step-{capability}.json").read_text("utf-8"))["records"]


def _of_svi(column: str) -> tuple[float, float, float] | None:
    """The latest ratio of experiments/svi_speed, eight schools: traced for the eager column, compiled for the last."""
    way = {"avx512": "traced", "compiled": "compiled"}.get(column)
    lines = map(json.loads, (HERE.parent / "svi_speed" / "results.jsonl").read_text("utf-8").splitlines())
    found = [r["ratio"] for r in lines if r["problem"] == "schools" and r["device"] == "cpu" and r.get("way") == way]
    return (found[-1],) * 3 if found else None


def _cell(wanted: float | None, measured: tuple[float, float, float] | None, beside: str) -> str:
    if measured is None:
        return "" if wanted is None else f"open (target {wanted:g})"
    middle, low, high = measured
    text = f"{middle:.2f}" if low == high else f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    if wanted is not None:
        text = f"**{text}** of {wanted:g}" if middle >= wanted else f"{text}, short of {wanted:g}"
    return text + beside


def cells() -> Iterator[str]:
    """Every eager cell: flowpath's milliseconds and the ratio of each peer to it."""
    for capability, run in runs().items():
        yield f"**{capability.upper()}**"
        yield ""
        yield "| case | operation | flowpath, ms | with fused Adam | nflows | zuko | normflows | Pyro |"
        yield "|---|---|---|---|---|---|---|---|"
        for r in run["records"]:
            if r["mode"] == "eager":
                ms, fused = r["milliseconds"], r["milliseconds"].get("flowpath, fused Adam")
                ratios = (r["ratios"].get(p) for p in ("nflows", "zuko", "normflows", "pyro"))
                shown = " | ".join("" if v is None else f"{v['median']:.2f}" for v in ratios)
                best = "" if fused is None else f"{fused['median']:.3g}"
                case = f"{r['case']}, batch {r['batch']}"
                yield f"| {case} | {r['operation']} | {ms['flowpath']['median']:.3g} | {best} | {shown} |"
        yield ""


def compiled() -> Iterator[str]:
    """The compiled cells, with what compiling cost."""
    yield "| case | operation | CPU | flowpath, ms | nflows eager | zuko compiled | cold: flowpath, nflows, zuko |"
    yield "|---|---|---|---|---|---|---|"
    for capability, run in runs().items():
        for r in (r for r in run["records"] if r["mode"] == "compiled"):
            ratios, cold = r["ratios"], r["cold_cpu_seconds"]
            beside = (ratios.get(name) for name in ("nflows", "zuko, compiled"))
            shown = " | ".join("-" if v is None else f"{v['median']:.2f}" for v in beside)
            took = ", ".join(
                f"{cold[f'{who}, compiled']:.0f} s" if f"{who}, compiled" in cold else "-"
                for who in ("flowpath", "nflows", "zuko")
            )
            ms = r["milliseconds"].get("flowpath, compiled")
            mine = "-" if ms is None else f"{ms['median']:.3g}"
            yield f"| {r['case']} | {r['operation']} | {capability.upper()} | {mine} | {shown} | {took} |"


def behind() -> Iterator[str]:
    """Cells below the floor."""
    found = slower(runs())
    yield f"Cells in which a peer is faster (ratio below {LEAST:g}): {len(found) or 'none'}."
    for capability, case, operation, peer, ratio in found:
        yield f"- {capability.upper()}: {case}, {operation}: {peer} {ratio:.2f}"


def memory() -> Iterator[str]:
    """Peak memory of a training step."""
    steps = json.loads((RESULTS / "memory.json").read_text("utf-8"))["steps"]
    by = {s["name"]: s for s in steps}
    yield "| library | peak, MiB | graph, MiB | CPU, s | peak: times flowpath's | times checkpointed flowpath's |"
    yield "|---|---|---|---|---|---|"
    ours, checked = by["flowpath"]["peak_mib"], by["flowpath, checkpoint_layers"]["peak_mib"]
    for s in steps:
        ratios = f"{s['peak_mib'] / ours:.2f} | {s['peak_mib'] / checked:.2f}"
        kept = "" if s["kept_mib"] is None else f"{s['kept_mib']:.0f}"
        sizes = f"{s['peak_mib']:.0f} | {kept} | {s['cpu_seconds']:.1f}"
        yield f"| {s['name']} | {sizes} | {ratios} |"


def graph() -> Iterator[str]:
    """The step that a long `fp.fit` takes, beside the plain one and beside nflows."""
    yield "| case | CPU | plain step, ms | one graph, ms | times quicker than plain | than nflows | seconds to trace |"
    yield "|---|---|---|---|---|---|---|"
    for capability in runs():
        for r in _graphs(capability):
            plain, mine = (r["milliseconds"][who]["median"] for who in ("flowpath, fused Adam", "flowpath, one graph"))
            ratios = " | ".join(f"{r['ratios'][who]['median']:.2f}" for who in ("flowpath, fused Adam", "nflows"))
            case = f"{r['case']}, batch {r['batch']} | {capability.upper()}"
            yield f"| {case} | {plain:.3g} | {mine:.3g} | {ratios} | {r['seconds_to_trace']:.1f} |"


def floor() -> Iterator[str]:
    """The ratio to nflows that the conditioners' products alone would have, and the ratios that were reached."""
    least = json.loads((RESULTS / "floor.json").read_text("utf-8"))
    capability = least["capability"].lower()
    records = {(r["case"], r["operation"], r["mode"]): r for r in runs()[capability]["records"]}
    as_graph = {(r["case"], "train"): r["ratios"]["nflows"] for r in _graphs(capability)}
    yield "| case | operation | the products alone, ms | they alone: times nflows | eager | one graph | compiled |"
    yield "|---|---|---|---|---|---|---|"
    for case, operations in least["milliseconds"].items():
        for operation, ms in operations.items():
            eager = records.get((case, operation, "eager"), {})
            reached = (
                eager.get("ratios_fused", eager.get("ratios", {})).get("nflows"),
                as_graph.get((case, operation)),
                records.get((case, operation, "compiled"), {}).get("ratios", {}).get("nflows"),
            )
            most = ms["nflows"] / ms["products"]
            cells = ("" if r is None else f"{r['median']:.2f} ({100 * r['median'] / most:.0f} %)" for r in reached)
            yield f"| {case} | {operation} | {ms['products']:.3g} | {most:.1f} | {' | '.join(cells)} |"


def agreement() -> Iterator[str]:
    """How far flowpath is from nflows with the same weights."""
    worst = max(v for run in runs().values() for v in run["agreement"]["worst"].values())
    yield f"Worst difference from nflows with the same weights, all cases, float64: {worst:.1e}."


def machine() -> Iterator[str]:
    """What the runs ran on."""
    for capability, run in runs().items():
        around = run["surroundings"]
        versions = ", ".join(f"{k} {v}" for k, v in around["versions"].items())
        yield f"- {capability.upper()}: {around['processor']}, {around['threads']} thread, {versions}."


BLOCKS: dict[str, Callable[[], Iterator[str]]] = {
    f.__name__: f for f in (targets, cells, graph, compiled, floor, behind, memory, agreement, machine)
}


def filled(page: str) -> str:
    """The page with every block written anew."""
    return _BLOCK.sub(lambda m: m[1] + "\n".join(BLOCKS[m[2]]()).rstrip() + "\n" + m[3], page)


def main() -> None:
    page = PAGE.read_text("utf-8")
    if "--check" in sys.argv[1:]:
        if filled(page) != page:
            raise SystemExit("docs/speed.md differs from the saved results: python -m experiments.bench.table")
        return
    PAGE.write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()
