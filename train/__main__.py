"""`python -m abyssal.train ...` is the same as `abyssal ...`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
