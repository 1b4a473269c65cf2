"""`accelerate launch scripts/train.py RECIPE.yaml [--any_field value]`: the same as `llmalign train`."""

import sys

from llmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
