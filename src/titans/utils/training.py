"""The import path of the optimizer and schedule that existing users know; they live in `titans.training.optimizer`."""

from titans.training.optimizer import build_optimizer, get_cosine_schedule_with_warmup

__all__ = ["build_optimizer", "get_cosine_schedule_with_warmup"]
