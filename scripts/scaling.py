"""Prints accelerate_configs/SCALING.md in some minutes: `python scripts/scaling.py > accelerate_configs/SCALING.md`."""

from llmalign.plan.paper import page

if __name__ == "__main__":
    print(page(), end="")
