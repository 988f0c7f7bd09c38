"""`python -m kvcompile`."""

import sys

from kvcompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
