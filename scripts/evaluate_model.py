"""`python scripts/evaluate_model.py MODEL [options]`: the same as `llmalign evaluate`.

Not called evaluate: this folder comes first on the path of its scripts, and it would hide the library of that name.
"""

import sys

from llmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
