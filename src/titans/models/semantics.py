"""Which semantics files were made for: the same configuration and weights have not always meant the same."""

from __future__ import annotations

# Raised when the same configuration and weights would compute something else; older files are then refused.
# 1: sigmoid gates in MAG and MAC; 2: MAC without `read_through`, values of any length, θ without (1 - η);
# 3: MAG as a product alone.
SEMANTICS = "4"


def check_semantics(made_for: str | None, what: str) -> None:
    """Refuse ``what`` a file holds if it was made for other semantics; files of the first do not say."""
    if (made_for or "1") != SEMANTICS:
        raise ValueError(f"{what} was made for semantics {made_for or '1'} of its configuration, this is {SEMANTICS}")
