"""`python -m llmalign.cli` is `llmalign`."""

import sys

from llmalign.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
