"""`python -m lpa`, the same as `lpa`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
