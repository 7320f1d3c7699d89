"""Every documented field of the three configurations acts, or is refused with an error that names it."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from titans import MirasConfig
from titans.miras import MLP, GradientDescent, Matrix, Momentum
from titans_miras import MACTransformer, MIRASArchitecture, MIRASConfig, NeuralMemoryConfig, TransformerConfig, config

SIZES = {"num_tokens": 31, "dim": 16, "depth": 2, "segment_len": 8, "heads": 2, "neural_mem": {"heads": 2}}
PARTS = {"": TransformerConfig, "neural_mem": NeuralMemoryConfig, "miras": MIRASConfig}
PAGE = Path(__file__).parents[2] / "docs" / "from_python_titans_miras.md"

# The fields that the original documents.
FIELDS = {
    "": """num_tokens dim dim_head depth segment_len neural_mem miras num_longterm_mem_tokens num_persist_mem_tokens
        heads ff_mult num_residual_streams use_flex_attn use_sliding_window_attn""",
    "neural_mem": """accept_weight_residual add_value_residual attn_pool_chunks batch_size chunk_size
        default_model_kwargs default_step_transform_max_lr depth dim dim_head gate_attn_output
        gated_transition heads init_adaptive_step_bias init_decay_bias init_momentum_bias layers
        learned_combine_include_zeroth learned_momentum_combine max_grad_norm max_lr
        max_mem_layer_modulation mem_model_norm_add_residual momentum momentum_order num_kv_per_token
        per_head_learned_parameters per_parameter_lr_modulation post_rmsnorm pre_rmsnorm qk_rmsnorm
        qkv_receives_diff_views segment_len apply_spectral_norm_surprises use_accelerated_scan miras""",
    "miras": """yaad_delta moneta_bias_p moneta_gate_p moneta_regularization_weight memora_temperature architecture
        memora_normalize_mode""",
}

# (part, field, value, the variant it acts in): another value than SIZES' changes what the model computes.
HONOURED = [
    ("", "num_tokens", 40, "default"),
    ("", "dim", 32, "default"),
    ("", "depth", 1, "default"),
    ("", "segment_len", 4, "default"),
    ("", "heads", 4, "default"),
    ("", "ff_mult", 2, "default"),
    ("", "num_longterm_mem_tokens", 3, "default"),
    ("", "num_persist_mem_tokens", 3, "default"),
    ("", "neural_mem", {"heads": 1}, "default"),
    ("", "miras", {"architecture": "yaad"}, "default"),
    ("neural_mem", "heads", 1, "default"),
    ("neural_mem", "depth", 1, "default"),
    ("neural_mem", "depth", 3, "default"),
    ("neural_mem", "default_model_kwargs", {"depth": 2, "expansion_factor": 2.0}, "default"),
    ("neural_mem", "default_model_kwargs", {"depth": 3}, "default"),
    ("neural_mem", "mem_model_norm_add_residual", False, "default"),
    ("neural_mem", "momentum", False, "default"),
    ("neural_mem", "momentum", True, "yaad"),
    ("neural_mem", "max_lr", 0.2, "default"),
    ("neural_mem", "batch_size", 4, "default"),
    ("neural_mem", "chunk_size", 4, "default"),
    ("neural_mem", "chunk_size", (4, 4), "default"),
    ("neural_mem", "segment_len", 4, "default"),
    ("neural_mem", "init_adaptive_step_bias", 1.0, "default"),
    ("neural_mem", "init_momentum_bias", 1.0, "default"),
    ("neural_mem", "init_decay_bias", -2.0, "default"),
    ("neural_mem", "miras", {"architecture": "moneta"}, "default"),
    ("miras", "architecture", "moneta", "yaad"),
    ("miras", "yaad_delta", 0.3, "yaad"),
    ("miras", "moneta_bias_p", 3.0, "moneta"),
    ("miras", "moneta_gate_p", 4.0, "moneta"),
    ("miras", "memora_temperature", 0.5, "memora"),
]

# Fields that repeat what follows from others: (part, field, the value that does, one that does not).
FOLLOWING = [
    ("", "dim_head", 8, 64),
    ("neural_mem", "dim", 16, 64),
    ("neural_mem", "dim_head", 8, 16),
    ("neural_mem", "layers", (1, 2), (2,)),
]

ONE_VALUE = [
    (part, name, field.json_schema_extra["accepted"])
    for part, kind in PARTS.items()
    for name, field in kind.model_fields.items()
    if field.json_schema_extra
]


def make(part="", field=None, value=None, variant="default"):
    values = {**SIZES, "miras": {"architecture": variant}}
    if field is not None:
        values = {**values, field: value} if not part else {**values, part: {**values[part], field: value}}
    return TransformerConfig(**values)


def build(configuration):
    torch.manual_seed(0)
    return MACTransformer(config=configuration).double()


def answers(configuration):
    model = build(configuration)
    torch.manual_seed(1)
    return {n: p.shape for n, p in model.named_parameters()}, model(torch.randint(31, (2, 29))).detach()


def other(value):
    return not value if isinstance(value, bool) else 0.5 if value is None else value + 1


def same(one, two):
    return one[0] == two[0] and torch.equal(one[1], two[1])


@pytest.mark.parametrize(("part", "field", "value", "variant"), HONOURED)
def test_the_field_acts(part, field, value, variant):
    shapes, logits = answers(make(variant=variant))
    new_shapes, new_logits = answers(make(part, field, value, variant))
    assert shapes != new_shapes or (logits - new_logits).abs().max() > 1e-6


@pytest.mark.parametrize(("part", "field", "right", "wrong"), FOLLOWING)
def test_a_field_that_follows_takes_only_what_follows(part, field, right, wrong):
    assert same(answers(make(part, field, right)), answers(make()))
    with pytest.raises(ValidationError, match=rf"{field} = .* is refused: .*(dim = 16|layers 1 to 2)"):
        make(part, field, wrong)


@pytest.mark.parametrize(("part", "field", "accepted"), ONE_VALUE)
def test_a_field_without_effect_takes_no_other_value(part, field, accepted):
    for value in accepted:
        assert same(answers(make(part, field, value)), answers(make()))
    wrong = other(accepted[0])
    if wrong not in accepted:  # two flags are right either way
        with pytest.raises(ValidationError, match=rf"{field} = .* is refused: \S.{{15}}"):
            make(part, field, wrong)


def test_every_documented_field_is_among_these():
    treated = [(part, field) for part, field, *_ in (*HONOURED, *FOLLOWING, *ONE_VALUE)]
    treated.append(("miras", "memora_normalize_mode"))
    for part, kind in PARTS.items():
        assert set(FIELDS[part].split()) == set(kind.model_fields) == {f for p, f in treated if p == part}


def test_the_page_tells_every_field():
    page = PAGE.read_text()
    assert not [name for kind in PARTS.values() for name in kind.model_fields if f"`{name}`" not in page]


@pytest.mark.parametrize("kind", PARTS.values())
def test_unknown_fields_are_errors(kind):
    given = SIZES if kind is TransformerConfig else {}
    with pytest.raises(ValidationError, match="momentun"):
        kind(**given, momentun=True)


@pytest.mark.parametrize(
    ("part", "field", "value", "says"),
    [
        ("", "heads", 3, "heads = 3 is refused: it must divide dim = 16"),
        ("neural_mem", "heads", 3, "neural_mem.heads = 3 is refused"),
        ("neural_mem", "batch_size", 16, "neural_mem.batch_size = 16 is refused: .* must divide .*segment_len = 8"),
        ("neural_mem", "chunk_size", 3, "neural_mem.chunk_size = 3 is refused"),
        ("neural_mem", "chunk_size", (4, 8), "chunk_size = .* is refused"),
        ("neural_mem", "chunk_size", 0, "chunk_size = 0 is refused"),
        ("neural_mem", "segment_len", 3, "neural_mem.segment_len = 3 is refused"),
        ("neural_mem", "default_model_kwargs", {"width": 3}, "default_model_kwargs = .*unknown"),
        ("neural_mem", "max_lr", 0.0, "max_lr"),
        ("miras", "yaad_delta", 0.0, "yaad_delta"),
        ("miras", "moneta_bias_p", 0.5, "moneta_bias_p"),
        ("miras", "moneta_gate_p", 0.5, "moneta_gate_p"),
        ("miras", "moneta_gate_p", 9.0, "moneta_gate_p"),
        ("miras", "moneta_bias_p", 17.0, "moneta_bias_p"),
        ("miras", "memora_temperature", 0.0, "memora_temperature"),
    ],
)
def test_a_value_without_meaning_is_refused(part, field, value, says):
    with pytest.raises(ValidationError, match=says):
        make(part, field, value)


@pytest.mark.parametrize("mode", ["l1", "l2"])
def test_memora_is_normalised_by_softmax_alone(mode):
    with pytest.raises(ValidationError, match=f"memora_normalize_mode = '{mode}' is refused: .*softmax"):
        MIRASConfig(architecture="memora", memora_normalize_mode=mode)
    assert MIRASConfig(memora_normalize_mode=mode).architecture is MIRASArchitecture.DEFAULT


@pytest.mark.parametrize(
    "fields",
    [
        {"depth": 3, "default_model_kwargs": {"depth": 2}},
        {"depth": 1, "default_model_kwargs": {"expansion_factor": 2.0}},
        {"chunk_size": 4, "segment_len": 2},
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields):
    with pytest.raises(ValidationError, match="is refused"):
        NeuralMemoryConfig(**fields)
    with pytest.raises(ValidationError, match="init_momentum_bias = 1.0 is refused"):
        make("neural_mem", "init_momentum_bias", 1.0, "memora")


@pytest.mark.parametrize(
    ("fields", "chunk"),
    [
        ({}, 8),
        ({"chunk_size": 4}, 4),
        ({"segment_len": 2}, 2),
        ({"batch_size": 2, "chunk_size": 4}, 2),
        ({"batch_size": 4, "segment_len": 2}, 4),
    ],
)
def test_the_memory_chunk(fields, chunk):
    assert TransformerConfig(**{**SIZES, "neural_mem": fields}).to_titans().chunk_size == chunk


@pytest.mark.parametrize(
    ("miras", "rule"),
    [
        (MIRASConfig(), MirasConfig.titans()),
        (MIRASConfig(architecture="yaad", yaad_delta=0.4), MirasConfig.yaad(0.4)),
        (MIRASConfig(architecture="moneta"), MirasConfig.moneta(1.5, 1.5)),
        (MIRASConfig(architecture="memora"), MirasConfig.memora()),
    ],
)
def test_variants_are_the_presets(miras, rule):
    assert TransformerConfig(**{**SIZES, "miras": miras}).to_titans().miras == rule
    inner = {**SIZES, "neural_mem": {"miras": miras}, "miras": MIRASConfig(architecture="yaad", yaad_delta=9)}
    assert TransformerConfig(**inner).to_titans().miras == rule
    for momentum, algorithm in ((True, Momentum()), (False, GradientDescent())):
        memory = {"momentum": momentum, "depth": 1}
        changed = TransformerConfig(**{**SIZES, "miras": miras, "neural_mem": memory}).to_titans().miras
        assert changed == rule.model_copy(update={"algorithm": algorithm, "architecture": Matrix()})


def test_max_lr_caps_the_step_on_a_mean_over_channels():
    assert make("neural_mem", "max_lr", 0.4).to_titans().theta_max == pytest.approx(0.4 / 8)
    model = build(make("neural_mem", "init_adaptive_step_bias", 50.0)).model
    trace = model.blocks[0].mixer.memory.trace(torch.randn(1, 5, 16, dtype=torch.float64))
    assert (trace.theta / (1 - trace.eta)).max().item() == pytest.approx(0.1 / 8)


def test_configurations_survive_a_round_trip():
    made = [
        make(),
        make("neural_mem", "default_model_kwargs", {"depth": 3}),
        make("miras", "yaad_delta", 2, "yaad"),
        make("neural_mem", "chunk_size", (4, 4)),
    ]
    for one in made:
        assert (
            TransformerConfig(**one.model_dump()) == one == TransformerConfig.model_validate_json(one.model_dump_json())
        )
    assert made[1].neural_mem.network == MLP(depth=3)


def test_changes_after_construction_are_checked():
    changed = make()
    with pytest.raises(ValidationError, match="use_flex_attn = True is refused"):
        changed.use_flex_attn = True
    changed.neural_mem.batch_size = 5  # the outer configuration cannot see this
    with pytest.raises(ValidationError, match=r"neural_mem.batch_size = 5 is refused"):
        MACTransformer(config=changed)


def test_the_config_module_offers_the_names():
    assert config.MemoraNormalizeMode("softmax") is config.MIRASConfig().memora_normalize_mode
