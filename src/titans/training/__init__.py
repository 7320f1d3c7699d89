"""Training: the optimizer and schedule, the configuration of a run, and the run itself.

Importing this package needs torch and pydantic only. ``titans.training.run`` imports transformers and accelerate
(extra ``train``), so it is not imported here.
"""

from titans.training.config import ConfigError, TrainConfig
from titans.training.optimizer import build_optimizer, get_cosine_schedule_with_warmup

__all__ = ["ConfigError", "TrainConfig", "build_optimizer", "get_cosine_schedule_with_warmup"]
