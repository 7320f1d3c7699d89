"""Memory in chosen layers, sliding-window attention in the others."""

import pytest
import torch

from helpers import assert_close
from tiny import VARIANTS, ids, small
from titans import ModelState, TitansConfig, load_model
from titans.layers.neural_memory import NeuralMemory
from titans.models.mixers.attention import AttentionMixer


@pytest.mark.parametrize("variant", VARIANTS)
def test_chosen_blocks_have_the_memory_and_the_others_attention(variant, tmp_path):
    model, x = small(variant, n_layers=3, memory_layers=(1,)), ids()
    assert [isinstance(block.mixer, AttentionMixer) for block in model.blocks] == [True, False, True]
    assert len([m for m in model.modules() if isinstance(m, NeuralMemory)]) == 1
    assert {block.mixer.attention.window for block in (model.blocks[0], model.blocks[2])} == {5}
    whole, state, pieces = model(x).logits, None, []
    for part in x.split([1, 6, 14], 1):
        out = model(part, state=state)
        state, pieces = out.state, [*pieces, out.logits]
    assert_close(torch.cat(pieces, 1), whole)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :4] = False
    assert_close(model(x, attention_mask=mask).logits[:1, 4:], model(x[:1, 4:]).logits)

    model = model.float()
    model.save_pretrained(tmp_path / "model")
    model(x).state.save(tmp_path / "state")
    again = load_model(tmp_path / "model")
    assert again.config.memory_layers == (1,)
    state = ModelState.load(tmp_path / "state")
    assert_close(again(x, state=state).logits, model(x, state=model(x).state).logits)


def test_all_layers_are_the_default():
    model, x = small("MAC"), ids()
    chosen = small("MAC", memory_layers=[0, 1])
    assert torch.equal(model(x).logits, chosen(x).logits)
    assert not any(isinstance(m, NeuralMemory) for m in small("MAC", memory_layers=()).modules())


def test_blocks_without_the_memory_have_nothing_of_it():
    """What only MAC may have does not keep a MAC from having blocks that are none."""
    model, x = small("MAC", memory_layers=(1,), n_memory_tokens=2), ids()
    state = model(x[:, :5]).state
    assert_close(model(x[:, 5:], state=state).logits, model(x).logits[:, 5:])


@pytest.mark.parametrize(
    "fields", [{"memory_layers": (2,)}, {"memory_layers": (-1,)}, {"variant": "swa", "memory_layers": (0,)}]
)
def test_layers_that_cannot_have_one_are_refused(fields):
    with pytest.raises(ValueError, match=r"memory_layers must be among the blocks 0\.\.1 of a variant with a memory"):
        TitansConfig(**{"n_layers": 2, "d_model": 16, **fields})
