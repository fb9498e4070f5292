"""`python -m flowpath`."""

import sys

from flowpath.cli import main

if __name__ == "__main__":
    sys.exit(main())
