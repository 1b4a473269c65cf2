"""`python scripts/push.py RUN --repo USER/NAME`: the same as `llmalign push`."""

import sys

from llmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
