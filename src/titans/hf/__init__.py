"""Titans models behind transformers' Auto classes. The only package that knows transformers' model classes.

``titans.hf.register()`` makes ``AutoConfig`` and ``AutoModelForCausalLM`` find the folders that training, `TitansModel`
and :class:`TitansForCausalLM` write; importing this package registers them.
"""

from titans.hf.adapter import TitansForCausalLM, TitansHFOutput, register
from titans.hf.cache import TitansCache
from titans.hf.config import TitansHFConfig

register()

__all__ = ["TitansCache", "TitansForCausalLM", "TitansHFConfig", "TitansHFOutput", "register"]
