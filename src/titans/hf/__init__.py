"""Titans models behind transformers' Auto classes. The only package that knows transformers' model classes.

``titans.hf.register()`` makes ``AutoConfig`` and ``AutoModelForCausalLM`` find the folders that training, `TitansModel`
and :class:`TitansForCausalLM` write; importing this package registers them.
"""

from titans.hf.adapter import TitansCache, TitansForCausalLM, TitansHFOutput, register
from titans.hf.config import TitansHFConfig
from titans.hf.graft import graft, grafts, load_graft, memories, save_graft

register()

__all__ = ["TitansCache", "TitansForCausalLM", "TitansHFConfig", "TitansHFOutput", "register"]
__all__ += ["graft", "grafts", "load_graft", "memories", "save_graft"]
