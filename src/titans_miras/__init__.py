"""The names of python-titans-miras on top of ``titans``: a translation of configurations, no second implementation.

Every documented field acts or is refused with the reason; the table is docs/from_python_titans_miras.md.
"""

from titans import __version__
from titans_miras.config import (
    MemoraNormalizeMode,
    MIRASArchitecture,
    MIRASConfig,
    NeuralMemoryConfig,
    TransformerConfig,
)
from titans_miras.transformer import MACTransformer

__all__ = [
    "MACTransformer",
    "MIRASArchitecture",
    "MIRASConfig",
    "MemoraNormalizeMode",
    "NeuralMemoryConfig",
    "TransformerConfig",
    "__version__",
]
