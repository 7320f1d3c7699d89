"""``python experiments/01_miras_variants/run_comparison.py --scale small``: ``titans experiment miras-variants``."""

import sys
from pathlib import Path

from titans.cli import main

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this repository's experiments
    sys.exit(main(["experiment", "miras-variants", *sys.argv[1:]]))
