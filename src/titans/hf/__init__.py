"""Titans models behind transformers' Auto classes. The only package that knows transformers' model classes.

``titans.hf.register()`` makes ``AutoConfig`` and ``AutoModelForCausalLM`` find folders that
:class:`TitansForCausalLM` saved; importing this package registers them.
"""

from titans.hf.adapter import TitansForCausalLM, TitansHFConfig, TitansHFOutput, register

register()

__all__ = ["TitansForCausalLM", "TitansHFConfig", "TitansHFOutput", "register"]
