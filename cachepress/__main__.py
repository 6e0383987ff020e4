"""``python -m cachepress`` is the command line."""

import sys

from cachepress.cli import main

if __name__ == "__main__":
    sys.exit(main())
