"""Titans models behind transformers' Auto classes. The only package that knows transformers' model classes.

Importing it makes the Auto classes find the folders that training, our models and grafted ones write, see `register`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from titans.hf.adapter import TitansCache, TitansForCausalLM, TitansHFModel, TitansHFOutput
from titans.hf.config import TitansHFConfig
from titans.hf.graft import GraftConfig, graft, grafts, load_graft, memories, save_graft


def register() -> None:
    """Make the Auto classes know us; calling it again changes nothing."""
    for config in (TitansHFConfig, GraftConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(TitansHFConfig, TitansHFModel, exist_ok=True)
    AutoModelForCausalLM.register(TitansHFConfig, TitansForCausalLM, exist_ok=True)


register()

__all__ = ["TitansCache", "TitansForCausalLM", "TitansHFConfig", "TitansHFModel", "TitansHFOutput", "register"]
__all__ += ["graft", "grafts", "load_graft", "memories", "save_graft"]
