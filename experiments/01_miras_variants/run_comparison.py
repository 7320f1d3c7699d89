"""``python experiments/01_miras_variants/run_comparison.py --scale small``: ``titans experiment miras-variants``."""

import sys

from titans.cli import main

if __name__ == "__main__":
    sys.exit(main(["experiment", "miras-variants", *sys.argv[1:]]))
