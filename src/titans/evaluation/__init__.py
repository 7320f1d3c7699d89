"""Tasks of the field, measured: needles in haystacks, questions about small worlds, recall, perplexity."""

from titans.evaluation.from_memory import FromMemory, ask_questions
from titans.evaluation.harness import evaluate
from titans.evaluation.perplexity import MemoryMode, nats_by_position
from titans.evaluation.task import EvaluationError
from titans.evaluation.tasks import GROUPS, TASKS, TaskRows, training_batch

__all__ = [
    "GROUPS",
    "TASKS",
    "EvaluationError",
    "FromMemory",
    "MemoryMode",
    "TaskRows",
    "ask_questions",
    "evaluate",
    "nats_by_position",
    "training_batch",
]
