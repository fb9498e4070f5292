"""The HTML report: one file that fetches nothing, verdict first, text escaped."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from matplotlib.figure import Figure

import flowpath as fp
from flowpath import report
from flowpath.diagnostics.report import Part

NASTY = "<script>alert('x')</script> & \"co\""


def finding(*grades: str, sound: bool = True) -> fp.Report:
    parts = tuple(Part(f"part {i} {NASTY}", grade, f"says {NASTY}") for i, grade in enumerate(grades))
    return fp.Report(f"a verdict {NASTY}", sound, parts, 120)


def figure() -> Figure:
    made = Figure(figsize=(2, 2))
    made.subplots().plot([0, 1], [0, 1])
    return made


@pytest.fixture(scope="module")
def text() -> str:
    tables = {f"columns {NASTY}": [{"column": NASTY, "min": 0.123456789, "n": 3, "ok": True}], "empty": []}
    return report.page(f"run {NASTY}", finding("pass", "warn"), {f"pairs {NASTY}": figure()}, tables, {NASTY: NASTY})


class Tags(HTMLParser):
    """Collects tags and attributes, and which tags were left open."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_well_formed(text: str) -> None:
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and text.startswith("<!doctype html>")


def test_a_page_fetches_nothing(text: str) -> None:
    tags = Tags()
    tags.feed(text)
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert {tag for tag, _ in tags.found} & {"script", "link", "iframe", "object", "base"} == set()
    sources = [attributes["src"] for _, attributes in tags.found if "src" in attributes]
    assert len(sources) == 1 and str(sources[0]).startswith("data:image/png;base64,")


def test_the_verdict_comes_first(text: str) -> None:
    places = [text.index(word) for word in ("a verdict", "<figure>", "Findings on 120 rows", "columns", "Settings")]
    assert places == sorted(places)


def test_text_is_escaped(text: str) -> None:
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8


@pytest.mark.parametrize(
    ("found", "tone"),
    [
        (finding("pass", "skipped"), "good"),
        (finding("pass", "warn"), "doubt"),
        (finding("fail", "warn", sound=False), "fail"),
    ],
    ids=["good", "doubt", "fail"],
)
def test_the_verdict_has_a_tone(found: fp.Report, tone: str) -> None:
    assert f'class="verdict {tone}"' in report.page("run", found)


def test_numbers_are_short_and_aligned(text: str) -> None:
    assert '<td class="number">0.123457</td><td class="number">3</td><td>True</td>' in text
    assert f'<td class="text">{html.escape(NASTY)}</td>' in text
    assert "<p>none</p>" in text


def test_write_makes_the_folder(tmp_path: Path) -> None:
    path = report.write(tmp_path / "a" / "b.html", "run", finding("pass"))
    assert path.read_text().startswith("<!doctype html>")


@pytest.fixture(scope="module")
def model() -> tuple[fp.FlowDensity, pl.DataFrame]:
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"a": rng.normal(size=240), "n": rng.poisson(4, 240)})
    with torch.random.fork_rng(devices=[]):
        fitted = fp.FlowDensity({"n": fp.integer(0)}, "gaussian", epochs=20, device="cpu", random_state=0).fit(table)
    return fitted, table


def test_judge_draws_and_writes(model: tuple[fp.FlowDensity, pl.DataFrame], tmp_path: Path) -> None:
    fitted, table = model
    judged = report.judge(fitted, table[:100], held="validation")
    path = judged.write(tmp_path / "out", "run: table.csv")
    assert {p.name for p in path.parent.iterdir()} == set(report.FILES)
    page = path.read_text()
    for words in ("cannot be told from n = 100", "integer(0)", "rows train", "architecture", "torch", "note 1"):
        assert words in page
    assert len(re.findall("<figure>", page)) == 3
    assert judged.settings["epochs at most"] == 5  # of four passes each
    assert judged.settings["epochs"].startswith("5, the weights are those of epoch")


def test_judge_draws_columns_beside_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"y": rng.normal(size=240), "c": rng.normal(size=240)})
    fitted = fp.FlowDensity(architecture="gaussian", epochs=1, random_state=0).fit(table[["y"]], context=table[["c"]])
    drawn = []
    monkeypatch.setattr(report.plot, "pairs", lambda *given: drawn.append(given) or figure())
    report.judge(fitted, table[["y"]], table[["c"]])
    data, samples, names = drawn[0]
    assert names == ["y", "c"]
    assert np.array_equal(data[:, 1], samples[:, 1]) and not np.array_equal(data[:, 0], samples[:, 0])


def test_judge_goes_with_the_seed(model: tuple[fp.FlowDensity, pl.DataFrame]) -> None:
    fitted, table = model
    first, again, other = (report.judge(fitted, table[:60], seed=seed).figures for seed in (0, 0, 1))
    assert first == again and first != other


def test_rows_are_drawn_by_their_weights() -> None:
    weights = np.zeros(100)
    weights[[3, 7]] = 1.0, -2.0
    assert set(report._some(100, weights, 0).tolist()) == {3}
    assert sorted(report._some(50, None, 0).tolist()) == list(range(50))
