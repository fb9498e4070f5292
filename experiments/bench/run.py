"""The bench under the name that every experiment has: `python experiments/bench/run.py [--smoke]`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.__main__ import main

if __name__ == "__main__":
    main()
