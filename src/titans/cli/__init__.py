"""The command line ``titans``: parse, call, exit.

Every command is a module here with one function; the work itself is done on the floors below. Bad input ends in one
line on standard error and exit code 2, a run that fails in one line and exit code 1.
"""

from titans.cli.entry import main

__all__ = ["main"]
