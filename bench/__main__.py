"""`python -m agrepa_fast.bench`: the same as `agrepa bench`."""

import sys

from agrepa_fast.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
