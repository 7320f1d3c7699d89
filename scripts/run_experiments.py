"""``python scripts/run_experiments.py NAME --scale small``: the same as ``titans experiment NAME --scale small``."""

import sys
from pathlib import Path

from titans.cli import main

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's experiments
    sys.exit(main(["experiment", *sys.argv[1:]]))
