"""``python -m titans.cli``."""

import sys

from titans.cli import main

sys.exit(main())
