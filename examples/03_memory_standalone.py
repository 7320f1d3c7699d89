"""The neural memory as a layer for any sequence of vectors: write, carry the state, read only, look inside."""

import torch

from titans import NeuralMemory
from titans.miras import MirasConfig

torch.manual_seed(0)
memory = NeuralMemory(d_model=64, n_layers=2, n_heads=2, chunk_size=16)
x = torch.randn(2, 100, 64)

# Reading and writing: every token makes one gradient step on the memory's weights, then reads from them.
y = memory(x)
print(f"y {tuple(y.shape)}")

# The state is a value: pass it in, get the next one. Any split of the sequence gives the same result.
first, state = memory(x[:, :37], return_state=True)
second, state = memory(x[:, 37:], state=state, return_state=True)
print(f"split and whole differ by {(torch.cat((first, second), 1) - y).abs().max().item():.1e}")

# Reading only: the memory stays as the state left it.
r = memory.retrieve(x[:, :5], state=state)
print(f"retrieved {tuple(r.shape)}")

# Looking inside, per token and head: the surprise ‖g_t‖ falls when the same tokens come again.
seen_again = memory.trace(x, state=state)
print(
    f"surprise at first sight {memory.trace(x).surprise.mean():.3f}, at second sight {seen_again.surprise.mean():.3f}"
)

# Another of the MIRAS choices: the Titans rule word for word.
verbatim = NeuralMemory(d_model=64, n_heads=2, chunk_size=16, miras=MirasConfig.titans())
print(f"verbatim rule {tuple(verbatim(x).shape)}")
