"""``python -m nautile.cli``."""

import sys

from nautile.cli import main

if __name__ == "__main__":
    sys.exit(main())
