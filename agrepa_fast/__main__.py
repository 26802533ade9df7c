"""`python -m agrepa_fast` is the same as `agrepa`."""

import sys

from .cli import main

sys.exit(main())
