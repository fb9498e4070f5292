"""What `check` found: parts with numbers, and one verdict in plain words."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Grade = Literal["pass", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Part:
    """One finding: what was looked at, its grade, a sentence, the numbers behind it, and a doubt in a few words."""

    name: str
    grade: Grade
    says: str
    numbers: dict[str, float] = field(default_factory=dict)
    doubt: str = ""


@dataclass(frozen=True)
class Report:
    """The findings of `fp.check`, printed as text, or as a dict or HTML.

    Attributes:
        verdict: one line in plain words.
        sound: whether sampler and density agree and both are finite; a flow that is not sound must not be used.
        parts: the findings, in order.
        rows: how many rows were looked at.
    """

    verdict: str
    sound: bool
    parts: tuple[Part, ...]
    rows: int

    def __str__(self) -> str:
        width = max(len(p.name) for p in self.parts)
        return "\n".join([self.verdict, *(f"  {p.grade:7s} {p.name:{width}s}  {p.says}" for p in self.parts)])

    def part(self, name: str) -> Part:
        """The finding of that name.

        Raises:
            KeyError: there is none of that name.
        """
        return {p.name: p for p in self.parts}[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; numbers that are not finite become None."""
        parts = [
            {
                "name": p.name,
                "grade": p.grade,
                "says": p.says,
                "numbers": {k: v if math.isfinite(v) else None for k, v in p.numbers.items()},
            }
            for p in self.parts
        ]
        return {"verdict": self.verdict, "sound": self.sound, "rows": self.rows, "parts": parts}

    def to_html(self) -> str:
        """A fragment: the verdict and a table of findings."""
        rows = "".join(
            f'<tr class="{p.grade}"><td>{p.grade}</td><td>{html.escape(p.name)}</td><td>{html.escape(p.says)}</td></tr>'
            for p in self.parts
        )
        return f'<p class="verdict">{html.escape(self.verdict)}</p><table class="findings">{rows}</table>'
