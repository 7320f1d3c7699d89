"""``python scripts/train.py --config FILE``: the same as ``titans train --config FILE``."""

import sys

from titans.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
