"""Tiny models in float64 and token ids for them; every variant of the library, whatever file it is in."""

import torch

from titans import MirasConfig, TitansConfig, build_model
from titans.models.registry import MIXERS

ALL = [name for name, mixer in MIXERS.items() if mixer.__module__.startswith("titans.")]
VARIANTS = [name for name in ALL if MIXERS[name].has_memory]
VOCAB = 11


SETTINGS = [
    {"miras": MirasConfig.titans(), "n_persistent": 0, "d_hidden": None},
    {"conv_kernel": 0, "use_decay": False},
    {"n_memory_tokens": 2, "use_momentum": False, "mem_layers": 1, "d_hidden": None},
    {"mem_heads": 3, "mem_head_dim": 8, "d_hidden": 24},
]


def small(variant, **changes):
    torch.manual_seed(0)
    fields = {
        "variant": variant, "vocab_size": VOCAB, "d_model": 12, "n_layers": 2, "n_heads": 2, "mem_heads": 2,
        "d_hidden": 16, "n_persistent": 3, "chunk_size": 4, "segment_len": 8, "window": 5,
    }  # fmt: skip
    model = build_model(TitansConfig(**{**fields, **changes})).double()
    # Trained models have large memories; the initial output projections would hide their part.
    for name, p in model.named_parameters():
        if p.dim() == 2 and "gates" not in name:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


def ids(batch=2, tokens=21, seed=1):
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def tensors(state):
    found = []
    state.map(lambda x: found.append(x) or x)
    return found


OF_BYTES = {"vocab_size": 256, "d_model": 16, "n_layers": 1, "chunk_size": 16, "n_persistent": 2}
LINE = "the quick brown fox jumps over the lazy dog\n"


def model_and_text(folder):
    """``model``, of bytes, and ``text.txt`` in a folder, which is returned."""
    torch.manual_seed(0)
    build_model(TitansConfig(**OF_BYTES)).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(LINE * 9)
    return folder


def model_text_and_memory(folder):
    """`model_and_text`, and ``memory``, what the command makes of the text."""
    from titans.cli import main

    model_and_text(folder)
    words = ["memorize", "--model", folder / "model", "--input", folder / "text.txt", "--output", folder / "memory"]
    assert main([str(word) for word in words]) == 0
    return folder
