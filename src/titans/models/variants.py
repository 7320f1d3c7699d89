"""The four models by name: thin constructors that build a ``TitansConfig``."""

from __future__ import annotations

from typing import Any, ClassVar

from titans.models.config import TitansConfig
from titans.models.language_model import TitansModel
from titans.ops.memory import Engine


class Shorthand(TitansModel):
    """A variant by its own name.

    Args:
        vocab_size, d_model, n_layers, mem_layers, d_hidden, n_persistent, chunk_size, ffn_mult, use_momentum,
        use_decay: as in :class:`TitansConfig`.
        engine: how the memories compute, as `TitansModel` has it.
        fields: any other field of :class:`TitansConfig`, by name.
    """

    variant: ClassVar[str]

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        n_layers: int = 12,
        mem_layers: int | None = None,
        d_hidden: int | None = None,
        n_persistent: int = 16,
        chunk_size: int = 128,
        ffn_mult: float = 4,
        use_momentum: bool | None = None,
        use_decay: bool | None = None,
        engine: Engine | None = None,
        **fields: Any,
    ):
        super().__init__(
            TitansConfig(
                variant=self.variant,
                vocab_size=vocab_size,
                d_model=d_model,
                n_layers=n_layers,
                mem_layers=mem_layers,
                d_hidden=d_hidden,
                n_persistent=n_persistent,
                chunk_size=chunk_size,
                ffn_mult=ffn_mult,
                use_momentum=use_momentum,
                use_decay=use_decay,
                **fields,
            ),
            engine,
        )


class TitansLMM(Shorthand):
    """The neural memory as the only mixer (Titans §4.3)."""

    variant = "LMM"


class TitansMAC(Shorthand):
    """Memory as a context: each segment attends to what the memory recalls for it (Titans §4.1)."""

    variant = "MAC"


class TitansMAG(Shorthand):
    """Memory as a gate beside sliding-window attention (Titans §4.2); takes ``window`` as well."""

    variant = "MAG"


class TitansMAL(Shorthand):
    """Memory as a layer before sliding-window attention (Titans §4.3); takes ``window`` as well."""

    variant = "MAL"


CLASSES: dict[str, type[TitansModel]] = {c.variant: c for c in (TitansLMM, TitansMAC, TitansMAG, TitansMAL)}
