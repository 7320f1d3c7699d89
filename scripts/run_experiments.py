"""``python scripts/run_experiments.py NAME --scale small``: the same as ``titans experiment NAME --scale small``."""

import sys

from titans.cli import main

if __name__ == "__main__":
    sys.exit(main(["experiment", *sys.argv[1:]]))
