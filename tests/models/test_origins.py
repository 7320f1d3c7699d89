"""Whose a state is: no change of a model's weights is overlooked, and a state itself never changes."""

import copy
import threading

import pytest
import torch

from helpers import assert_close
from tiny import ALL, VARIANTS, ids, small, tensors
from titans import NeuralMemory
from titans.models import ModelState
from titans.models.decoding import Buffers, begin_steps


def fused_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()


def other_block(model):
    model.blocks[0] = copy.deepcopy(model.blocks[0])


def other_embedding(model):
    model.embedding = copy.deepcopy(model.embedding)


def other_part_of_a_part(model):
    model.blocks[1].mixer.branch.memory.qkv = copy.deepcopy(model.blocks[1].mixer.branch.memory.qkv)


@pytest.mark.parametrize("change", [fused_step, other_block, other_embedding, other_part_of_a_part])
def test_weights_that_changed_unseen_by_torch_are_noticed(change, tmp_path):
    model = small("LMM")
    with torch.no_grad():
        state = model(ids()).state
    change(model)
    with pytest.raises(ValueError, match="weights have changed since this state was made"):
        state.save(tmp_path / "s.st")
    with torch.no_grad():
        model(ids()).state.save(tmp_path / "s.st")
    model.check_state(ModelState.load(tmp_path / "s.st"))


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_a_state_holds_no_parameter(variant):
    """Of a stream that has read little, the memory is A_0, and training changes that in place."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = small(variant).to(dtype)
        of_weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        state = model(ids()[:, :1]).state
        for held in (state, model(ids()[:, :1], state=state).state, state.reset([0]), state.forget()):
            assert not of_weights & {x.untyped_storage().data_ptr() for x in tensors(held)}
    layer = NeuralMemory(16, n_heads=2, chunk_size=16)
    x = torch.randn(1, 3, 16)
    state = layer(x, return_state=True)[1]
    before = copy.deepcopy(state)
    for weights in layer.initial_weights:
        weights.mul_(-3)
    assert_close(layer(x, state=state), layer(x, state=before))


def test_the_right_to_write_is_given_once():
    model = small("LMM")
    buffers = Buffers(begin_steps(model, model(ids()).state))
    found, barrier = [], threading.Barrier(8)

    def claim():
        barrier.wait()
        found.append(buffers.claim())

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False] * 7 + [True] and not buffers.claim()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_two_steps_at_once_from_one_state_do_not_mix(variant):
    """One begins while the other is under way, as two threads may: here inside the first's last map."""
    model = small(variant)
    state = model(ids()[:, 3:4], state=model(ids()).state).state
    tokens = ids(2, 6, seed=5)
    wanted = [model(tokens[:, i : i + 1], state=copy.deepcopy(state)).state for i in range(2)]
    found = []

    def other(*_):
        hook.remove()
        found.append(model(tokens[:, 1:2], state=state).state)

    hook = model.norm.register_forward_pre_hook(other)
    found.insert(0, model(tokens[:, :1], state=state).state)
    for i in (1, 0):
        more = tokens[:, 2:]
        assert_close(model(more, state=found[i]).logits, model(more, state=wanted[i]).logits, f"step {i}")


@pytest.mark.parametrize("engine", ["reference", "chunked", "fused", "native"])
def test_a_second_derivative_is_an_error(engine):
    """Torch's of ``layer_norm``'s is wrong in silence, hand-written ones have none."""
    model = small("LMM", conv_kernel=0)
    model.set_engine(engine)
    x = torch.randn(1, 9, 12, dtype=torch.float64, requires_grad=True)
    loss = model(inputs_embeds=x).logits.square().mean()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        gradient.square().sum().backward()


def test_a_built_model_takes_no_other_configuration(tmp_path):
    model = small("LMM")
    with pytest.raises(ValueError, match="config.chunk_size: the model is built with 4, got 8"):
        model.config = model.config.model_copy(update={"chunk_size": 8})
    model.config = model.config.model_copy(update={"max_seq_len": 77})
    assert model.config.max_seq_len == 77 and model.config.chunk_size == 4
    with pytest.raises(ValueError, match="cannot change"):
        model.config.chunk_size = 8
