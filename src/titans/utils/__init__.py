"""Import paths that users of earlier packages know; re-exports only."""

from titans.miras import MirasConfig
from titans.models import TitansConfig, build_model, count_parameters

__all__ = ["MirasConfig", "TitansConfig", "build_model", "count_parameters"]
