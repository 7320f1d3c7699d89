"""A memory to put beside a layer of any decoder, behind a gate that starts at zero. `titans.hf.graft` plants it.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans.layers.module import RMSNorm
from titans.layers.neural_memory import NeuralMemoryState
from titans.models.config import TitansConfig
from titans.models.mixers.parts import make_memory


class Graft(nn.Module):
    """tanh(gate) ⊗ M(norm(x)) for a layer's input x [B, T, d_model], to be added to its output.

    Args:
        config: of the memory; see `titans.models.mixers.parts.make_memory`.
        layer: number of the layer.
    """

    def __init__(self, config: TitansConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.norm = RMSNorm(config.d_model)
        self.memory = make_memory(config)
        self.gate = nn.Parameter(torch.zeros(config.d_model))
        self.masks: dict[str, Tensor | None] = {}  # of the decoder's call, [B, T]: layers see none of this shape

    def forward(self, x: Tensor, held: dict[int, NeuralMemoryState]) -> Tensor:
        """What to add; ``held`` has the states by layer, and is brought up to date."""
        state = held.get(self.layer)
        read, held[self.layer] = self.memory(self.norm(x), state=state, return_state=True, **self.masks)
        return torch.tanh(self.gate) * read


def grafts(model: nn.Module) -> nn.ModuleDict:
    """A model's memories, with norms and gates, by layer: all that there is to train beside a frozen model."""
    return nn.ModuleDict({str(module.layer): module for module in model.modules() if isinstance(module, Graft)})
