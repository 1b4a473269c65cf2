"""`torchrun ... scripts/iterate.py RECIPE.yaml [--any_field value]`: the same as `llmalign iterate`."""

import sys

from llmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["iterate", *sys.argv[1:]]))
