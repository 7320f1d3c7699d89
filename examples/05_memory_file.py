"""Read once, ask later: a memory file, many questions from it as one batch, reading on, and what a file says."""

import tempfile
from pathlib import Path

import torch

from titans import TitansMAC, load_memory
from titans.models import MemoryFile

torch.manual_seed(0)
model = TitansMAC(vocab_size=256, d_model=32, n_layers=2, chunk_size=16, n_persistent=2).eval()
book = "It was a bright cold day in April, and the clocks were striking thirteen. " * 60

# What the memory has learned from a text of any length. Bytes need no tokenizer; else tokenizer=, or ids.
memory = model.memorize(book)
print(f"read {memory.seen[0]:,} tokens into {memory.nbytes:,} bytes")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "book.memory"
    for dtype in ("float32", "bfloat16", "int8"):
        memory.save(path, dtype)
        print(f"{dtype:8} {path.stat().st_size:,} bytes on disk")
    memory.save(path)
    print(f"the file says {MemoryFile.open(path).tokens:,} tokens")
    memory = load_memory(path, model)  # refused if another model made it

# 64 questions from one memory; each finds it as the book left it.
questions = torch.tensor([list(f"\nQuestion {n:2}?".encode()) for n in range(64)])
together = model.generate(questions, max_new_tokens=4, temperature=0, state=memory.fork(64))
alone = model.generate(questions[7:8], max_new_tokens=4, temperature=0, state=memory)
print(f"question 7 alone = in the batch: {torch.equal(alone, together[7:8])}")

# Read on from it; the first memory stays what it is.
more = model.memorize("April was over. ", state=memory)
print(f"then {more.seen[0]:,}, still {memory.seen[0]:,}")
