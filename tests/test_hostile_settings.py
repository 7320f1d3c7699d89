"""Settings that would be dropped, misread or never read to the end: one line says so instead."""

import json
import math

import pytest
import torch

from titans.models import TitansConfig
from titans.models.loss import check_items
from titans.models.yaml_text import parse_yaml
from titans.training.checkpoints import check_same
from titans.training.config import ConfigError, TrainConfig, load_model_config
from titans.training.run import train

BASE = {"model": {"d_model": 16, "n_layers": 1, "chunk_size": 8}, "data": {"length": 16}, "training": {"steps": 3}}


def lists(deep, of=3):
    names = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * of)}]" for i in range(deep)]
    return "\n".join(names), f"*a{deep - 1}"


def mappings(deep):
    names = [f"b{i}: &b{i} {{x: {value}, y: {value}}}" for i in range(deep) for value in [f"*b{i - 1}" if i else "1"]]
    return "\n".join(names), f"*b{deep - 1}"


def merges(deep):
    names = [f"c{i}: &c{i} {{<<: [{', '.join([f'*c{i - 1}'] * 2) if i else '{x: 1}'}]}}" for i in range(deep)]
    return "\n".join(names), f"*c{deep - 1}"


@pytest.mark.parametrize("text, name", [lists(24), mappings(24), merges(24)], ids=["lists", "mappings", "merges"])
@pytest.mark.parametrize("place", ["unknown: {}", "model: {}", "model: {{d_model: {}}}", "data: {{tasks: {}}}"])
def test_aliases_that_multiply_are_refused_at_once(tmp_path, text, name, place):
    file = tmp_path / "run.yaml"
    file.write_text(f"{text}\n{place.format(name)}\n")
    with pytest.raises(ConfigError, match=r"line \d+ holds more than 100,000 values, aliases written out"):
        TrainConfig.load(file)


def test_a_value_inside_itself_is_refused():
    for text in ("&a [*a]", "a: &a {b: *a}", "&a {a: 1, <<: *a}"):
        with pytest.raises(ValueError, match="not YAML|nested too deeply"):
            parse_yaml(text)


def test_ordinary_aliases_and_merges_are_read():
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]"
    assert parse_yaml(text) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}
    assert parse_yaml("") is None and parse_yaml("[" + "1, " * 50_000 + "1]")[-1] == 1


@pytest.mark.parametrize("override", ["training={steps: 7}", "model={d_model: 32}", "data=x", "training="])
def test_no_override_drops_a_whole_section(override):
    section = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"would drop every setting of {section}; name a field of it"):
        TrainConfig.parse(BASE, [override])
    rest = {name: fields for name, fields in BASE.items() if name != section}
    if override.endswith("}"):
        TrainConfig.parse(rest, [override, *([] if section == "data" else ["data.length=16"])])


def changed(**fields):
    config = TrainConfig.parse(BASE)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section), field, value)
    return config


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"data__length": 64}, "data.length is 64 but model.max_seq_len is 16"),
        ({"model__lr": 0.5}, "training.lr is .* but model.lr is 0.5"),
        ({"training__carry_state": True, "model__variant": "transformer"}, "training.carry_state: full attention"),
        ({"training__carry_state": True, "data__tasks": {"mqar_easy": 1.0}}, "training.carry_state: every row"),
    ],
)
def test_fields_assigned_to_different_sections_are_checked_together(fields, named, tmp_path):
    config = changed(**fields, training__output_dir=str(tmp_path / "run"))
    for use in (train, lambda config: config.to_yaml(tmp_path / "run.yaml"), TrainConfig.check):
        with pytest.raises(ConfigError, match=named):
            use(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "told, named",
    [
        ({"titans": [1]}, r"titans must be a mapping of settings, got \[1\]"),
        ({"titans": "x"}, "titans must be a mapping of settings, got 'x'"),
        ({"d_modle": 16}, "d_modle: unknown key, did you mean 'd_model'?"),
        ({"titans": {"n_layer": 2}}, "n_layer: unknown key, did you mean 'n_layers'?"),
    ],
)
def test_a_folder_s_configuration_without_our_fields_is_no_default_one(told, named, tmp_path):
    told = {"model_type": "titans", **told}
    (tmp_path / "config.json").write_text(json.dumps(told))
    for read in (TitansConfig.from_json, load_model_config):
        with pytest.raises(ValueError, match=named):
            read(tmp_path / "config.json")


def test_words_of_transformers_beside_all_of_our_fields_are_no_mistake():
    told = {
        **TitansConfig(d_model=32).to_dict(),
        "model_type": "titans",
        "use_cache": True,
        "max_length": 20,
        "dtype": 1,
    }
    assert TitansConfig.from_dict(told) == TitansConfig(d_model=32)


def test_a_copy_is_checked_and_cast():
    assert TitansConfig(d_model=16).model_copy(update={"d_model": "32"}).d_model == 32
    with pytest.raises(ValueError, match="d_model"):
        TitansConfig(d_model=16).model_copy(update={"d_model": "wide"})


def test_bytes_are_no_setting():
    with pytest.raises(ValueError, match="not YAML: .*binary"):
        parse_yaml("a: !!binary aGVsbG8=")


def test_a_resumed_run_names_the_field_that_was_changed(tmp_path):
    config = TrainConfig.parse(BASE)
    config.to_yaml(tmp_path / "config.yaml")
    for field, value in (("data.length", 32), ("training.lr", 0.5)):
        other = TrainConfig.parse(BASE, [f"{field}={value}"])
        with pytest.raises(ConfigError, match=f"^{field}: the run was started with .* resumed with {value}$"):
            check_same(other, tmp_path / "config.yaml")
    check_same(config, tmp_path / "config.yaml")


@pytest.mark.parametrize("items", [math.inf, math.nan, 0, "3", torch.tensor([1, 2]), torch.tensor(math.inf)])
def test_a_loss_is_divided_by_one_number(items):
    with pytest.raises(ValueError, match="num_items_in_batch must be positive, one finite number"):
        check_items(items)
