"""Build a model, run it with and without labels, read a long text in pieces, and generate."""

import torch

from titans import TitansConfig, build_model, count_parameters

torch.manual_seed(0)

# TitansConfig.small(variant="MAC") is the paper's 170 M model; this one is small enough for any laptop.
cfg = TitansConfig(variant="MAC", vocab_size=256, d_model=64, n_layers=2, chunk_size=16, segment_len=32)
model = build_model(cfg)
print(f"Parameters: {count_parameters(model):,}")

# Forward pass. Labels are the same ids; the shift happens inside.
input_ids = torch.randint(0, 256, (2, 128))
out = model(input_ids, labels=input_ids)
print(f"logits {tuple(out['logits'].shape)}, loss {out['loss'].item():.3f}")

# The state goes on where the last call stopped: two pieces give what one call gives.
model.eval()
with torch.no_grad():
    first = model(input_ids[:, :50])
    second = model(input_ids[:, 50:], state=first.state)
    whole = model(input_ids)
difference = (torch.cat((first.logits, second.logits), dim=1) - whole.logits).abs().max().item()
print(f"largest difference between two pieces and one call: {difference:.1e}")

# Generation takes constant time and memory per token, however long the context is.
prompt = torch.randint(0, 256, (1, 8))
generated = model.generate(prompt, max_new_tokens=50, top_k=50)
print(f"generated {tuple(generated.shape)}")
