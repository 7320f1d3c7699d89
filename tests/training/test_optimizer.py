"""Every parameter in one group, the right ones decayed, and the schedule's values at its corners."""

import math

import pytest
import torch
from torch import nn

from titans.memory import NeuralMemory
from titans.models import TitansConfig, build_model
from titans.training.optimizer import build_optimizer, get_cosine_schedule_with_warmup

VARIANTS = ("LMM", "MAC", "MAG", "MAL", "transformer", "swa")


def tiny(variant: str) -> nn.Module:
    return build_model(TitansConfig(variant=variant, vocab_size=32, d_model=16, n_layers=2, chunk_size=4, window=8))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_in_exactly_one_group(variant):
    model = tiny(variant)
    grouped = [id(p) for group in build_optimizer(model).param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}


class Gated(nn.Module):
    """A module with every kind of part that the protocol knows; ``child`` is decayed, ``gates`` and below are not."""

    undecayed = ("content", "gates", "switched_off", "pieces")

    def __init__(self):
        super().__init__()
        self.content = nn.Parameter(torch.ones(2, 3))
        self.gain = nn.Parameter(torch.ones(3))
        self.matrix = nn.Parameter(torch.ones(3, 3))
        self.gates = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 1)))
        self.pieces = nn.ParameterList([torch.ones(1, 2, 3)])
        self.switched_off = None
        self.child = nn.Linear(3, 3)


def decayed_names(model: nn.Module) -> set[str]:
    groups = build_optimizer(model).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in decayed}


def test_what_a_module_names_and_vectors_are_not_decayed():
    model = nn.ModuleDict({"outer": nn.ModuleList([Gated()]), "head": nn.Linear(3, 5)})
    assert decayed_names(model) == {"outer.0.matrix", "outer.0.child.weight", "head.weight"}


def test_names_are_relative_to_the_module_that_gives_them():
    """A parameter of the same name elsewhere is decayed."""
    model = nn.ModuleDict({"gated": Gated(), "gates": nn.Linear(3, 3)})
    assert "gates.weight" in decayed_names(model)


def test_a_tied_parameter_is_trained_once_and_undecayed_if_one_of_its_places_is():
    gated, plain = Gated(), nn.Linear(3, 3)
    gated.gates[0].weight = plain.weight
    model = nn.ModuleList([plain, gated])
    grouped = [id(p) for group in build_optimizer(model).param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert "0.weight" not in decayed_names(model)


def test_a_name_that_a_module_does_not_have_is_an_error():
    class Misspelt(nn.Linear):
        undecayed = ("wieght",)

    with pytest.raises(AttributeError, match="wieght"):
        build_optimizer(Misspelt(3, 3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_maps_of_activations_are_decayed(variant):
    model = tiny(variant)
    decayed = decayed_names(model)
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    gates = {id(part) for memory in memories for part in memory.gates.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and id(module) not in gates):
            tied = name == "head" and model.config.tie_embeddings
            assert f"{name}.weight" in decayed or tied
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            assert f"{name}.weight" not in decayed
        assert f"{name}.bias" not in decayed


def test_the_memory_keeps_its_gates_initial_weights_and_norm():
    memory = NeuralMemory(16, n_heads=2, chunk_size=4)
    undecayed = {name for name, _ in memory.named_parameters()} - decayed_names(memory)
    assert {"gates.up.weight", "gates.up.bias", "norm_gain", "norm_bias", "read_norm.weight"} <= undecayed
    assert {name for name, _ in memory.named_parameters() if name.startswith("initial_weights")} <= undecayed
    assert {"qkv.weight", "out.weight", "read_gate.weight"}.isdisjoint(undecayed)


def test_persistent_tokens_are_not_decayed():
    model = tiny("MAC")
    tokens = {name for name, _ in model.named_parameters() if name.endswith(".P")}
    assert tokens and tokens.isdisjoint(decayed_names(model))


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    (group,) = build_optimizer(model, weight_decay=0.3).param_groups
    assert group["weight_decay"] == 0.3
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        build_optimizer(model.requires_grad_(False))


def test_the_seeds_import_path_is_the_same_function():
    from titans.utils import training

    assert training.build_optimizer is build_optimizer
    assert training.get_cosine_schedule_with_warmup is get_cosine_schedule_with_warmup


def factors(warmup: int, total: int, ratio: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps=warmup, total_steps=total, min_lr_ratio=ratio)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_schedule_rises_to_the_peak_and_falls_to_the_ratio():
    lr = factors(warmup=4, total=24, ratio=0.1, steps=30)
    assert lr[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert lr[14] == pytest.approx(0.1 + 0.9 / 2)
    assert lr[4:25] == sorted(lr[4:25], reverse=True)
    assert lr[24:] == pytest.approx([0.1] * 6)
    assert lr[9] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 5 / 20)))


def test_schedule_without_warmup_and_with_more_warmup_than_steps():
    assert factors(warmup=0, total=2, ratio=0.0, steps=3) == pytest.approx([1.0, 0.5, 0.0])
    assert factors(warmup=10, total=3, ratio=0.1, steps=3) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("field", "arguments"),
    [("warmup_steps", (-1, 10, 0.1)), ("total_steps", (0, 0, 0.1)), ("min_lr_ratio", (0, 10, 1.5))],
)
def test_schedule_refuses_values_out_of_range(field, arguments):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=field):
        get_cosine_schedule_with_warmup(optimizer, *arguments)
