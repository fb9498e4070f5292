"""Write table.md from the saved results: fit_posterior against its targets, then every method.

python experiments/posteriors/table.py [folder]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.runner import load

HERE = Path(__file__).parent
NAMES = {
    "fit_posterior": "fit_posterior",
    "autoflow": "AutoFlow",
    "traced": "AutoFlow, traced",
    "diagonal": "AutoDiagonalNormal",
    "multivariate": "AutoMultivariateNormal",
    "iaf": "AutoIAFNormal",
    "spline": "AutoNormalizingFlow, spline couplings",
    "affine_ar": "AutoNormalizingFlow, affine autoregressive",
}
COSTLY = ("garch11", "hmm_drive_0", "low_dim_gauss_mix")  # their likelihoods; 90 seconds instead of 60
Line = dict[str, Any]


def last(lines: Iterable[Line]) -> list[Line]:
    """The last line of each posterior, method, dtype and seed, seeds in order."""
    kept = {(x["posterior"], x["method"], x["dtype"], x["seed"]): x for x in lines}
    return sorted(kept.values(), key=lambda x: x["seed"])


def number(x: float) -> str:
    """Three digits, or an order of magnitude."""
    if not math.isfinite(x):
        return str(x)
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}" if abs(x) < 1000 else f"{x:.0e}"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


COLUMNS: dict[str, Callable[[Line], str]] = {
    "KL (se)": lambda x: f"{number(x['kl'])} ({number(x['kl_se'])})",
    "k-hat": lambda x: f"{x['khat']:.2f}",
    "ESS": lambda x: f"{x['ess']:.1%}",
    "error of means, raw": lambda x: number(x["mean_error_max"]),
    "corrected": lambda x: number(x["corrected_mean_error_max"]),
    "sd ratios, raw": lambda x: f"{number(x['sd_ratio_min'])} .. {number(x['sd_ratio_max'])}",
    "corrected ": lambda x: f"{number(x['corrected_sd_ratio_min'])} .. {number(x['corrected_sd_ratio_max'])}",
    "log Z by its own weights (se)": lambda x: f"{x['log_evidence']:.3f} ({number(x['log_evidence_se'])})",
    "steps": lambda x: str(x["steps"]),
    "CPU s": lambda x: f"{x['fit_cpu']:.0f}",
}


def rows(lines: list[Line], key: Callable[[Line], str]) -> Iterable[list[str]]:
    """A row a line: its key, then the columns, or the error that it ended with."""
    for x in lines:
        if "error" in x:
            yield [key(x), x["error"].splitlines()[0][:80].replace("|", "/"), *[""] * (len(COLUMNS) - 1)]
        else:
            yield [key(x), *(column(x) for column in COLUMNS.values())]


def targets(lines: list[Line]) -> str:
    """How many of the fits meet each target."""
    limits: dict[str, Callable[[Line], bool]] = {
        "KL at most .02": lambda x: x["kl"] <= 0.02,
        "KL at most .05": lambda x: x["kl"] <= 0.05,
        "standard error below .004": lambda x: x["kl_se"] < 0.004,
        "k-hat below 0.7": lambda x: x["khat"] < 0.7,
        "k-hat below 0.5": lambda x: x["khat"] < 0.5,
        "corrected means within .05 sd": lambda x: x["corrected_mean_error_max"] <= 0.05,
        "corrected sds within 5 %": lambda x: (
            x["corrected_sd_ratio_min"] >= 0.95 and x["corrected_sd_ratio_max"] <= 1.05
        ),
        "CPU within 60 s (costly likelihoods: 90)": lambda x: x["fit_cpu"] <= (90 if x["posterior"] in COSTLY else 60),
    }
    met = {name: sum("error" not in x and test(x) for x in lines) for name, test in limits.items()}
    return "; ".join(f"{name}: {count} of {len(lines)}" for name, count in met.items())


def divergences(lines: list[Line]) -> str:
    """KL by posterior and method, seeds side by side."""
    methods = [m for m in NAMES if any(x["method"] == m for x in lines)]
    found: dict[tuple[str, str], list[str]] = {}
    for x in lines:
        entry = "fails" if "error" in x else number(x["kl"])
        found.setdefault((x["posterior"], x["method"]), []).append(entry)
    names = list(dict.fromkeys(x["posterior"] for x in lines))
    return markdown(
        ["posterior", *(NAMES[m] for m in methods)],
        ([name, *(", ".join(found.get((name, m), ["-"])) for m in methods)] for name in names),
    )


def text(lines: list[Line]) -> str:
    """The whole page."""
    lines, parts = (
        last(lines),
        ["# Eleven posteriors\n\nWritten by table.py from results.jsonl; run.py says what is what."],
    )
    for dtype in dict.fromkeys(x["dtype"] for x in lines):
        ours = [x for x in lines if (x["method"], x["dtype"]) == ("fit_posterior", dtype)]
        if ours:
            ours.sort(key=lambda x: x["posterior"])
            table = markdown(["posterior, seed", *COLUMNS], rows(ours, lambda x: f"{x['posterior']}, {x['seed']}"))
            parts.append(f"## fit_posterior, {dtype}\n\n{targets(ours)}.\n\n{table}")
    for dtype in dict.fromkeys(x["dtype"] for x in lines if x["method"] != "fit_posterior"):
        same = [x for x in lines if x["dtype"] == dtype]
        others = [x for x in same if x["method"] != "fit_posterior"]
        others.sort(key=lambda x: (x["posterior"], list(NAMES).index(x["method"])))
        full = markdown(
            ["posterior, method, seed", *COLUMNS],
            rows(others, lambda x: f"{x['posterior']}, {NAMES[x['method']]}, {x['seed']}"),
        )
        parts.append(f"## KL of all methods, {dtype}, nats\n\n{divergences(same)}")
        parts.append(f"## Guides in full, {dtype}\n\n{full}")
    return "\n\n".join(parts) + "\n"


def main(folder: Path) -> None:
    """Read a folder that run.py filled and leave table.md in it."""
    (folder / "table.md").write_text(text(load(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
