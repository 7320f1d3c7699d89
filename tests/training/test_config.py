"""The run's configuration: overrides, shared fields, and messages that name the field and its value."""

import math

import pytest

from titans.miras import MirasConfig
from titans.models import TitansConfig
from titans.models.yaml_text import parse_yaml
from titans.training.config import ConfigError, TrainConfig

SMALL = {"model": {"variant": "MAC", "d_model": 16, "vocab_size": 256}, "data": {"length": 32}}


def test_overrides_are_yaml_and_reach_nested_fields():
    config = TrainConfig.parse(SMALL, ["training.lr=1e-3", "training.threads=null", "model.n_layers=3"])
    assert config.training.lr == 1e-3
    assert config.training.threads is None
    assert config.model.n_layers == 3
    assert "training" not in SMALL


def test_a_shared_field_has_one_value_in_both_places():
    config = TrainConfig.parse({"model": {"lr": 2e-3, "max_seq_len": 64}})
    assert config.training.lr == config.model.lr == 2e-3
    assert config.data.length == config.model.max_seq_len == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batchsize=3", "training.batchsize: unknown key, did you mean 'batch_size'? (value 3)"),
        ("model.d_modle=8", "model.d_modle: unknown key, did you mean 'd_model'? (value 8)"),
        ("training.steps=0", "training.steps: Input should be greater than or equal to 1 (got 0)"),
        ("training.precision=fp8", "training.precision: Input should be 'float32' or 'bf16' (got 'fp8')"),
        ("data.length=1", "data.length: Input should be greater than or equal to 2 (got 1)"),
        ("model.max_seq_len=64", "data.length is 32 but model.max_seq_len is 64: give one of them"),
        ("extra=1", "extra: unknown key (value 1)"),
        ("training=5", "training: "),
        ("data.length.x=5", "--set data.length.x=5: data.length is 32, it has no fields"),
        ("steps", "--set steps: expected section.field=value"),
        ("training.steps=[1", "--set training.steps=[1: not YAML"),
    ],
)
def test_bad_fields_are_named_with_their_value_in_one_line(override, message):
    with pytest.raises(ConfigError) as error:
        TrainConfig.parse(SMALL, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [("- 1", "expected sections"), ("a: [", "not YAML"), (b"\xff\xfe\x00", "run.yaml")]
)
def test_a_file_that_holds_no_mapping_is_named(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        TrainConfig.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        TrainConfig.load(tmp_path / "none.yaml")


def test_the_resolved_file_reads_back_the_same(tmp_path):
    config = TrainConfig.parse(SMALL, ["training.steps=9"])
    config.to_yaml(tmp_path / "run.yaml")
    assert TrainConfig.load(tmp_path / "run.yaml").to_dict() == config.to_dict()


def test_a_config_object_is_a_section_too():
    model = TitansConfig(d_model=16, miras=MirasConfig.titans(), lr=2e-3)
    config = TrainConfig(model=model, data={"length": 32}, training={})
    assert config.model == model.model_copy(update={"max_seq_len": 32})
    assert config.training.lr == 2e-3


@pytest.mark.parametrize(
    "field", ["data.source", "data.tokenizer", "data.data_dir", "training.output_dir", "training.init_from"]
)
def test_home_is_expanded_as_in_a_shell(field, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    section, name = field.split(".")
    config = TrainConfig.parse(SMALL, [f"{field}=~/x"])
    assert getattr(getattr(config, section), name) == "/somewhere/x"


def test_a_key_given_twice_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  steps: 1\n  lr: 1\n  steps: 2\n")
    with pytest.raises(ConfigError, match="'steps' is given twice, again in line 4"):
        TrainConfig.load(path)


@pytest.mark.parametrize(
    ("told", "value"),
    [
        ("010", 10), ("1_000", 1000), ("-3", -3), ("0", 0), ("1e3", 1000.0), (".5", 0.5), ("1.", 1.0),
        ("-.inf", -math.inf),
        ("1:30", "1:30"), ("0x1f", "0x1f"), ("1.2.3", "1.2.3"), ("yes", True), ("~", None),
    ],
)  # fmt: skip
def test_numbers_are_those_that_everybody_reads(told, value):
    assert parse_yaml(told) == value
    assert math.isnan(parse_yaml(".nan"))


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_a_section_is_not_dropped_by_an_override_without_a_value(section):
    raw = {"model": {"d_model": 16}, "data": {"length": 32}, "training": {"steps": 3}}
    for value in ("", "null", "~"):
        with pytest.raises(ConfigError, match=f"would drop every setting of {section}"):
            TrainConfig.parse(raw, [f"{section}={value}"])
