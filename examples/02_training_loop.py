"""Train in a plain PyTorch loop, on the source files of Python's own standard library.

``titans train`` does the same with checkpoints, evaluation and exact resumption.
"""

import torch
from torch.utils.data import DataLoader

from titans import TitansConfig, build_model
from titans.data import TokenDocuments, WindowDataset, load_documents, load_tokenizer
from titans.utils.training import build_optimizer, get_cosine_schedule_with_warmup

STEPS, BATCH, LENGTH = 20, 4, 64

torch.manual_seed(0)
tokenizer = load_tokenizer("bytes")
documents = TokenDocuments.from_texts(load_documents("stdlib", "train"), tokenizer)
dataloader = DataLoader(WindowDataset(documents, length=LENGTH, seed=0, n_windows=STEPS * BATCH), batch_size=BATCH)

cfg = TitansConfig(
    variant="MAC", vocab_size=tokenizer.vocab_size, d_model=64, n_layers=1, chunk_size=16, segment_len=32
)
model = build_model(cfg)
optim = build_optimizer(model, lr=3e-3, weight_decay=0.1)  # AdamW; norms, biases and the memory's gates do not decay
sched = get_cosine_schedule_with_warmup(optim, warmup_steps=5, total_steps=STEPS, min_lr_ratio=0.1)

model.train()
for step, batch in enumerate(dataloader, start=1):
    out = model(batch["input_ids"], labels=batch["labels"])
    out["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    sched.step()
    optim.zero_grad()
    if step % 5 == 0:
        print(f"step {step}: loss {out['loss'].item():.3f}, lr {sched.get_last_lr()[0]:.1e}")
