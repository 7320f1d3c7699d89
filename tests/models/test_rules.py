"""Every member of every axis inside the four models: split, padded, saved, and through the reference engine."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_close
from members import ALGORITHMS, BIASES, NETWORKS, RETENTIONS, pairwise
from tiny import VARIANTS
from titans import MirasConfig, TitansConfig, build_model
from titans.models import ModelState

CASES = pairwise(
    variant=VARIANTS,
    bias=[b for b in BIASES if b != "error_signal"],  # a bare function cannot be saved
    retention=list(RETENTIONS),
    algorithm=list(ALGORITHMS),
    network=list(NETWORKS),
    gates=["head", "channel"],
)
TOKENS = 13


def build(variant, bias, retention, algorithm, network, gates):
    miras = MirasConfig(
        architecture=NETWORKS[network], bias=BIASES[bias], retention=RETENTIONS[retention],
        algorithm=ALGORITHMS[algorithm], gates=gates,
    )  # fmt: skip
    torch.manual_seed(0)
    return build_model(
        TitansConfig(
            variant=variant, vocab_size=11, d_model=12, n_layers=2, n_heads=2, mem_heads=2, miras=miras,
            n_persistent=2, chunk_size=3, segment_len=6, window=5,
        )
    ).double().eval()  # fmt: skip


def possible(algorithm, network, **_):
    return not (ALGORITHMS[algorithm].per_chunk and network == "vector")


@pytest.mark.parametrize("case", [c for c in CASES if possible(**c)], ids=lambda c: "-".join(c.values()))
def test_member_in_model(case, tmp_path):
    model = build(**case)
    x = torch.randint(11, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(x)
        first = model(x[:, :7])
        first.state.save(tmp_path / "memory.safetensors")
        second = model(x[:, 7:], state=ModelState.load(tmp_path / "memory.safetensors"))
        assert_close(torch.cat((first.logits, second.logits), 1), whole.logits, "split and saved")
        mask = torch.ones(2, TOKENS, dtype=torch.bool)
        mask[0, :5] = False
        padded = model(x, attention_mask=mask).logits
        assert_close(padded[0, 5:], model(x[:1, 5:]).logits[0], "padded")
        assert_close(padded[1], whole.logits[1], "its neighbour")
        model.set_engine("reference")
        assert_close(model(x).logits, whole.logits, "reference")
