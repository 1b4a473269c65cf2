"""`python scripts/evaluate.py MODEL [options]`: the same as `llmalign evaluate`."""

import sys

from llmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
