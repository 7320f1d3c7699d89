"""Language models with a neural long-term memory: LMM, MAC, MAG, MAL, and two baselines."""

from titans.models import mixers  # noqa: F401  registers them
from titans.models.build import build_model, count_parameters, load_model, save_model
from titans.models.config import TitansConfig
from titans.models.language_model import ModelOutput, TitansModel
from titans.models.memory_file import MemoryFile, load_memory
from titans.models.probe import MemoryReading, probe_memories
from titans.models.state import ModelState
from titans.models.variants import TitansLMM, TitansMAC, TitansMAG, TitansMAL

__all__ = [
    "MemoryFile",
    "MemoryReading",
    "ModelOutput",
    "ModelState",
    "TitansConfig",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TitansModel",
    "build_model",
    "count_parameters",
    "load_memory",
    "load_model",
    "probe_memories",
    "save_model",
]
