"""Bad input, by the hundred: each ends in one line that names the field or file, never in a traceback."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from titans import TitansConfig
from titans.cli import main
from titans.models import build_model
from titans.training.config import ConfigError, DataSection, TrainConfig, TrainingSection

SOURCE = Path(__file__).parents[1] / "src"
MODEL = {"vocab_size": 256, "d_model": 16, "n_layers": 1, "chunk_size": 8, "n_persistent": 2}
DEEP = "[" * 20_000


# -- every number of every configuration ------------------------------------------------------------------------------

SECTIONS = {"model": TitansConfig, "data": DataSection, "training": TrainingSection}


def numbers():
    """Every field that holds a number, as ``section.field``."""
    for section, kind in SECTIONS.items():
        for name, field in kind.model_fields.items():
            kinds = get_args(field.annotation) or (field.annotation,)
            if int in kinds or float in kinds:
                yield f"{section}.{name}"


NO_NUMBERS = (".nan", ".inf", "-.inf", "-1", "1" + "0" * 30, "true", "many", "[1]")


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("field", list(numbers()))
def test_every_number_has_its_range(field, value):
    with pytest.raises(ConfigError) as error:
        TrainConfig.parse({"model": MODEL, "data": {"length": 32}}, [f"{field}={value}"])
    assert field.partition(".")[2] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**30, True, "many", [1]])
@pytest.mark.parametrize("field", list(numbers()))
def test_a_refused_assignment_changes_nothing(field, value):
    config = TrainConfig.parse({"model": MODEL, "data": {"length": 32}})
    before = config.to_dict()
    section, name = field.split(".")
    with pytest.raises(ValueError):
        setattr(getattr(config, section), name, value)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("model", "d_model", 15), ("model", "n_heads", 5), ("model", "segment_len", 12), ("model", "variant", "RNN"),
        ("model", "n_memory_tokens", 2), ("model", "d_hidden", 7), ("model", "miras", {"bias": "none"}),
        ("run", "training", {"carry_state": True}),
    ],
)  # fmt: skip
def test_a_combination_refused_at_assignment_changes_nothing(kind, field, value):
    model = TitansConfig(
        **{**MODEL, "n_heads": 2, "mem_heads": 2, "variant": "MAG" if kind == "model" else "transformer"}
    )
    if field == "segment_len":
        model.variant = "MAC"
    config = model if kind == "model" else TrainConfig(model=model, data={"length": 32}, training={})
    before = config.to_dict()
    with pytest.raises(ValueError):
        setattr(config, field, value)
    assert config.to_dict() == before


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its state, a text and the YAML of a run."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model = build_model(TitansConfig(**MODEL))
    model.save_pretrained(folder / "model")
    model(torch.ones(1, 20, dtype=torch.long)).state.detach().save(folder / "state")
    (folder / "text.txt").write_text("to be or not to be, " * 200)
    training = {"steps": 2, "batch_size": 1, "eval_every": 0, "device": "cpu", "output_dir": str(folder / "out")}
    sections = {"model": MODEL, "data": {"source": str(folder / "text.txt"), "length": 16}, "training": training}
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    return folder


def complaint(capsys, words, place):
    """The one line in which a command refuses its input; nothing is written."""
    before = sorted(place.rglob("*"))
    code = main([str(word).replace("PLACE", str(place)) for word in words])
    shown = capsys.readouterr()
    assert code in (1, 2), shown.err
    assert shown.out == ""
    assert shown.err.startswith("titans: ") and shown.err.count("\n") == 1 and len(shown.err) < 1100
    assert "Error: " not in shown.err, "an error that nobody foresaw"
    assert sorted(place.rglob("*")) == before
    return shown.err


SETTINGS = {
    "training.output_dir": ("''", '"a\\0b"', "[]", "null", "/proc/nowhere/run", "/dev/null", "PLACE/text.txt/run",
        "x" * 300),
    "data.source": ("''", "/nowhere", "PLACE/run.yaml", '"a\\0b"', "5", "PLACE/model", "enwik9"),
    "data.tokenizer": ("''", "/nowhere", "PLACE/text.txt", "PLACE/run.yaml", "bpe", "5"),
    "data.text_field": ("''", "[]"),
    "data.length": ("1", "0", "5000000", "1.5"),
    "model.variant": ("mac", "RNN", "''", "[MAC]", "null"),
    "model.miras": ("{bias: {name: [l2]}}", "titan", "{bias: {name: lp, p: .nan}}", "{bias: 5}", "{bias: {}}", "[]",
        "{gates: per}"),
    "model.qkv_activation": ("relu", "null"),
    "model.ffn_mult": ("1e-9", "1e300"),
    "model.rope_base": ("5e-324", "0"),
    "model.vocab_size": ("100", "1"),
    "model.d_model": ("15.5", "''"),
    "model.n_heads": ("3", "17"),
    "model.theta_max": ("1e38", "0"),
    "training.lr": ("1e38", "0", "1,5"),
    "training.seed": (str(2**32), "1.5"),
    "training.steps": ("yes", "1.5", "''", "9" * 5000),
    "training.threads": ("100000", "0"),
    "training.precision": ("fp8", "16", "float64"),
    "training.engine": ("fast", "null"),
    "training.device": ("tpu", "cuda:99", "0"),
    "training.init_from": ("''", "/nowhere", "PLACE/text.txt", "PLACE"),
    "training.carry_state": ("5", "maybe"),
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in SETTINGS.items() for value in values])
def test_train_names_the_setting(place, capsys, field, value):
    told = complaint(capsys, ["train", "--config", "PLACE/run.yaml", "--set", f"{field}={value}"], place)
    assert field in told or field.rpartition(".")[2] in told


@pytest.mark.parametrize(
    "override",
    [
        "", "=", "a", "a=b", ".=1", "training.=1", "training..steps=1", "training.steps.x=1", "training=5",

        "training.steps=[1", "training.steps={", "training.steps=!!python/object:os.system x", "training.stepz=3",
        ".".join("a" * 3000) + "=1", f"training.steps={DEEP}", "training.steps=" + "9" * 4000, "x" * 100_000 + "=1",
        "training.seed=2020-13-45", "training.steps=&a [*a]", "data={length: 8, length: 9}",
    ],
)  # fmt: skip
def test_train_names_a_bad_override(place, capsys, override):
    complaint(capsys, ["train", "--config", "PLACE/run.yaml", "--set", override], place)


CONFIGS = {
    "empty": b"", "null": b"null", "list": b"- 1", "number": b"5", "text": b"hello", "binary": bytes(range(256)),
    "utf-16": "model: {}".encode("utf-16"), "latin-1": "a: é".encode("latin-1"), "nul": b"model:\0",
        "tab": b"model:\n\t- 1",
    "two documents": b"a: 1\n---\nb: 2", "open": b"model: {", "tag": b"!!python/object/apply:os.system [ls]",
    "deep": DEEP.encode(), "deep mapping": b"{a: " * 9000, "twice": b"training: {}\ntraining: {}",
    "nested twice": b"training:\n  steps: 1\n  steps: 2", "unknown": b"models: {}", "no mapping": b"model: []",
    "alias bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        f"{b}: &{b} [{','.join(9 * ['*' + a])}]\n".encode() for a, b in zip("abcdefg", "bcdefgh")
    ),
    "a list as a key": b"? [1, 2]\n: 3", "date": b"training: {steps: 2020-13-45}", "merge": b"<<: 5",
    "json nan": b'{"training": {"lr": NaN}}', "long key": b"x" * 200_000 + b": 1",
        "number of digits": b"a: " + b"9" * 9000,
}  # fmt: skip


@pytest.mark.parametrize("command", ["train", "info"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_configuration_file_is_named(place, tmp_path, capsys, name, command):
    file = tmp_path / "config.yaml"
    file.write_bytes(CONFIGS[name])
    if command == "info" and name in ("twice", "empty"):
        file.write_bytes(b"d_model: 8\nd_model: 9")
    assert "config.yaml" in complaint(capsys, [command, "--config", file], place)


@pytest.mark.parametrize(
    "words",
    [
        ["fly"], ["train"], ["train", "--config"], ["train", "--config", "/nowhere"], ["train", "--config", "PLACE"],
        ["train", "--config", "/dev/zero"], ["train", "--config", "PLACE/run.yaml", "--output", ""],
        ["train", "--config", "PLACE/run.yaml", "--fast"], ["train", "--config", "PLACE/run.yaml", "--resume"],
        ["train", "--config", "PLACE/run.yaml", "more"], ["train", "--config", "a\0b"], ["info"],
        ["train", "--config", "PLACE/run.yaml", "--output", "PLACE/text.txt"],
        ["info", "--config", "PLACE/text.txt"], ["info", "--config", "PLACE/state"],
        ["generate", "--model", "PLACE/model"], ["generate", "--prompt", "x"],
        *(["generate", "--prompt", "x", "--model", model] for model in ("", "/nowhere", "PLACE", "PLACE/text.txt",
            "/dev/null")),
        *(
            ["generate", "--prompt", "x", "--model", "PLACE/model", option, value]
            for option, values in {
                "--memory": ("/nowhere", "PLACE", "PLACE/text.txt", "PLACE/run.yaml",
                    "PLACE/model/model.safetensors", "/dev/null"),
                "--temperature": ("-1", "nan", "inf", "hot", ""),
                "--top-p": ("0", "-1", "1.5", "nan", "inf", "x"),
                "--top-k": ("0", "-1", "1.5", "x", "9" * 30),
                "--seed": ("-1", "9" * 30, "x", "1.5"),
                "--max-new-tokens": ("0", "-1", "x", "9" * 30, "1e3"),
            }.items()
            for value in values
        ),
    ],
    ids=lambda words: " ".join(words)[:60].replace("\0", "NUL"),
)  # fmt: skip
def test_bad_arguments_are_named(place, capsys, words):
    complaint(capsys, words, place)


# -- files ------------------------------------------------------------------------------------------------------------


def edit(**changes):
    return lambda told: {**told, **changes}


MODEL_CONFIGS = {
    "empty": b"", "list": b"[]", "number": b"5", "cut": b'{"d_model"', "deep": DEEP.encode(),
        "binary": b"\xff\xfe\x00",
    "digits": b'{"d_model": ' + b"9" * 5000 + b"}", "long value": b'{"nothing": "' + b"x" * 300_000 + b'"}',
    "unknown key": edit(d_modle=3), "other width": edit(d_model=32), "other depth": edit(n_layers=2),
    "huge width": edit(d_model=10**7), "huge depth": edit(n_layers=10**30), "nan": edit(rope_base=float("nan")),
    "text": edit(chunk_size="many"), "variant": edit(variant="x"), "null": edit(vocab_size=None),
}  # fmt: skip


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_a_bad_config_of_a_model_is_named(place, tmp_path, capsys, name):
    folder, change = tmp_path / "model", MODEL_CONFIGS[name]
    folder.mkdir()
    told = json.loads((place / "model" / "config.json").read_text())
    content = change if isinstance(change, bytes) else json.dumps(change(told)).encode()
    if name == "unknown key" or name == "long value":  # transformers keeps keys of its own in its folders
        told = {**MODEL, "d_modle": 3} if name == "unknown key" else {"nothing": "x" * 300_000}
        content = json.dumps(told).encode()
    (folder / "config.json").write_bytes(content)
    (folder / "model.safetensors").write_bytes((place / "model" / "model.safetensors").read_bytes())
    assert "model" in complaint(capsys, ["generate", "--model", folder, "--prompt", "x"], place)


def reshaped(tensors):
    name = next(iter(tensors))
    return {**tensors, name: tensors[name][..., :-1].contiguous()}


WEIGHTS = {
    "empty": b"", "zeros": bytes(100), "text": b"hello", "pickle": b"\x80\x04\x95", "huge header": struct.pack("<Q",
        2**60),
    "missing": lambda t: dict(list(t.items())[1:]), "renamed": lambda t: {f"x.{n}": v for n, v in t.items()},
    "one more": lambda t: {**t, "more": torch.ones(1)}, "another shape": reshaped,
        "none": lambda t: {"x": torch.ones(1)},
    "nan": lambda t: {n: torch.full_like(v, float("nan")) for n, v in t.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_weights_are_named(place, tmp_path, capsys, name):
    folder, change = tmp_path / "model", WEIGHTS[name]
    folder.mkdir()
    (folder / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    if isinstance(change, bytes):
        (folder / "model.safetensors").write_bytes(change)
    else:
        save_file(
            change(load_file(place / "model" / "model.safetensors")), folder / "model.safetensors", {"format": "pt"}
        )
    complaint(capsys, ["generate", "--model", folder, "--prompt", "x"], place)


TEXTS = {
    "a.jsonl": ("{", "5", "[]", "null", '{"text": 5}', '{"text": null}', '{"words": "x"}', DEEP,
        '{"text": ' + "9" * 5000 + "}"),
    "a.txt": ("", "x"),
    "a.parquet": ("", "PAR1", "hello"),
    "a.csv": ("a,b",),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts])
def test_a_bad_corpus_is_named(place, tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    words = ["train", "--config", "PLACE/run.yaml", "--set", f"data.source={tmp_path / name}"]
    told = complaint(capsys, words, place)
    assert name in told or "data." in told


TOKENIZERS = {
    "nothing": {},
    "no json": {"tokenizer.json": "hello"},
    "a list": {"tokenizer.json": "[]"},
    "deep": {"tokenizer.json": DEEP},
    "code": {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "config.json": {
        "auto_map": {"AutoConfig": "evil.EvilConfig"}, "model_type": "evil"}, "evil.py": "open('PLACE/ran', 'w')"},
    **{
        f"settings {i}": {"tokenizer.json": "BYTES", "tokenizer_config.json": told}
        for i, told in enumerate((["x"], {"eos_token": 5}, {"eos_token": ["x"]}, {"eos_token": {"content": 5}}, "{",
            "null"))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_bad_tokenizer_is_named_and_runs_nothing(place, tmp_path, capsys, name, monkeypatch):
    folder = tmp_path / "tok"
    folder.mkdir()
    for file, content in TOKENIZERS[name].items():
        if content == "BYTES":
            from tokenizers import Tokenizer, models

            Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / file))
            continue
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_text(text.replace("PLACE", str(tmp_path)))
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail(f"asked {question}"))
    words = ["train", "--config", "PLACE/run.yaml", "--set", f"data.tokenizer={folder}"]
    assert "tokenizer" in complaint(capsys, words, place)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["empty", "text", "no member", "encrypted", "compression"])
def test_a_bad_download_is_named(place, tmp_path, capsys, kind):
    file = tmp_path / "wikitext-103-raw-v1.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "x" if kind == "no member" else "wikitext-103-raw/wiki.train.raw", "" if kind == "empty" else " = A = "
        )
    content = bytearray(file.read_bytes())
    for sign, flag, method in ((b"PK\3\4", 6, 8), (b"PK\1\2", 8, 10)):
        at = content.index(sign)
        if kind == "encrypted":
            content[at + flag] |= 1
        if kind == "compression":
            content[at + method] = 77
    file.write_bytes(b"hello" if kind == "text" else content)
    words = [
        "train",
        "--config",
        "PLACE/run.yaml",
        "--set",
        "data.source=wikitext-103",
        "--set",
        f"data.data_dir={tmp_path}",
    ]
    assert "data.source: " in complaint(capsys, words, place)


def test_a_model_that_no_machine_holds_is_one_line(place, capsys):
    huge = ["--set", "model.vocab_size=2147483647", "--set", "model.d_model=1048576"]
    told = complaint(capsys, ["train", "--config", "PLACE/run.yaml", *huge], place)
    assert "not enough memory" in told


@pytest.mark.parametrize("engine", ["native", "compiled"])
def test_an_engine_without_its_compiler_is_one_line(place, capsys, monkeypatch, tmp_path, engine):
    from titans.models import language_model
    from titans.ops.memory import native

    monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler was found (g++, clang++ or $CXX)")
    if engine == "compiled":  # as torch's inductor says it, in the first step

        def fail(*arguments, **named):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nin\nmany lines")

        monkeypatch.setattr(language_model.TitansModel, "forward", fail)
    words = ["train", "--config", str(place / "run.yaml"), "--output", str(tmp_path / "run")]
    assert main([*words, "--set", f"training.engine={engine}"]) == (2 if engine == "native" else 1)
    told = capsys.readouterr().err
    assert told.startswith("titans: ") and told.count("\n") == 1 and "C++ compiler" in told and engine in told


# -- terminals, pipes and encodings -----------------------------------------------------------------------------------


def shell(command, place, **environment):
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **environment}
    line = command.replace("titans ", f"{sys.executable} -m titans.cli ").replace("PLACE", str(place))
    return subprocess.run(["bash", "-c", line], capture_output=True, env=variables, timeout=100)


GENERATE = "titans generate --model PLACE/model --prompt x --max-new-tokens 30"


@pytest.mark.parametrize(
    ("command", "environment", "code"),
    [
        (GENERATE, {"PYTHONIOENCODING": "ascii"}, 0),
        (f"{GENERATE} > /dev/full", {}, 1),
        (f"{GENERATE} >&-", {}, 1),
        (f"{GENERATE} 2>&- | head -c 1", {}, 0),
        ("titans info --config PLACE/run.yaml", {"COLUMNS": "20", "PYTHONIOENCODING": "ascii"}, 0),
        ("titans info --config PLACE/run.yaml > /dev/full", {"COLUMNS": "0"}, 1),
        ("titans train --config /nowhere/😀 2> /dev/full", {"PYTHONIOENCODING": "ascii"}, 2),
    ],
)
def test_output_survives_any_encoding_width_and_pipe(place, command, environment, code):
    done = shell(command, place, **environment)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") <= 1
    if code == 0 and "info" in command:
        assert b"FLOPs per token" in done.stdout and b"..." not in done.stdout


def test_info_says_the_same_at_any_width(place, capsys, monkeypatch):
    shown = set()
    for width in ("0", "1", "20", "200"):
        monkeypatch.setenv("COLUMNS", width)
        assert main(["info", "--config", str(place / "run.yaml")]) == 0
        shown.add(capsys.readouterr().out)
    assert len(shown) == 1


def test_any_folder_name_will_do(place, tmp_path, capsys):
    for name in ("😀", "a\nb", "[red]x", "#", "é", " ", "{}", "'\""):
        output = tmp_path / name / "run"
        assert (
            main(["train", "--config", str(place / "run.yaml"), "--output", str(output), "--set", "training.steps=1"])
            == 0
        )
        assert (output / "model").is_dir()
        capsys.readouterr()
