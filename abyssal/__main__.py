"""`python -m abyssal ...` is the same as `abyssal ...`."""

import sys

from .train.cli import main

if __name__ == "__main__":
    sys.exit(main())
