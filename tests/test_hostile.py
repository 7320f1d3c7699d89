"""Cases thought up by somebody who wants to break things: each ends in one error that names what is wrong."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiny import ids, small
from titans import TitansConfig
from titans.data import StreamDataset, TokenDocuments, WindowDataset, evaluation_windows, load_documents, load_tokenizer
from titans.files import write_whole
from titans.models import ModelState, load_model
from titans.training import build_optimizer, get_cosine_schedule_with_warmup
from titans.training.config import ConfigError, TrainConfig

NAN = float("nan")
MODEL = small("MAC")
BYTES = load_tokenizer()
TEXTS = TokenDocuments.from_texts(["abc" * 30, "x"], BYTES)


def state():
    return MODEL(ids()).state.detach()


STATES = {
    "to int8": (lambda s: s.to(torch.int8), "floating-point dtype"),
    "select beyond": (lambda s: s.select([10**20]), "rows must be a list of row numbers"),
    "select ragged": (lambda s: s.select([[0], [0, 1]]), "rows must be a list of row numbers"),
    "select words": (lambda s: s.select(["first"]), "rows must be a list of row numbers"),
    "select nan": (lambda s: s.select([NAN]), "rows must be row numbers"),
    "select a mask": (lambda s: s.select(torch.tensor([True, False])), "rows must be row numbers"),
    "select set": (lambda s: s.select({0}), "rows must be a list"),
    "fork True": (lambda s: s.fork(True), "copies must be an integer"),
    "fork inf": (lambda s: s.fork(float("inf")), "copies must be an integer"),
    "fork absurd": (lambda s: s.fork(10**9), "copies of 2 rows must make at most 1,048,576, got 1,000,000,000"),
    "fork beyond integers": (lambda s: s.fork(2**63), "copies of 2 rows must make at most"),
    "put twice": (lambda s: s.put([0, 0], s), "rows must differ"),
    "put too few": (lambda s: s.put([0], s), "put needs a state of 1 rows, got 2"),
    "put another variant": (lambda s: s.put([0], small("MAG")(ids(1)).state), "another configuration"),
    "call, other rows": (lambda s: MODEL(ids(1), state=s), "state has 2 rows, input_ids has 1"),
    "call, layers lost": (lambda s: MODEL(ids(), state=dataclasses.replace(s, layers=())), "state has 0 layers"),
    "call, read too long": (
        lambda s: MODEL(ids(), state=dataclasses.replace(s, read=torch.tensor([1, 2, 3]))),
        "state has 3 rows",
    ),
    "generate, other rows": (lambda s: MODEL.generate(ids(1), state=s), "state has 2 rows, input_ids has 1"),
    "save NUL": (lambda s: s.save("a\0b"), "null byte"),
    "load NUL": (lambda s: ModelState.load("a\0b"), "does not exist"),
    "load nowhere": (lambda s: ModelState.load("/nowhere/s.st"), "does not exist"),
    "load a folder": (lambda s: ModelState.load("/"), "does not exist"),
}


@pytest.mark.parametrize("name", STATES)
def test_states(name):
    call, message = STATES[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(state())


CALLS = {
    "no tokens": (lambda: MODEL(ids()[:, :0]), "non-empty"),
    "no rows": (lambda: MODEL(ids()[:0]), "non-empty"),
    "int16": (lambda: MODEL(ids().short()), "input_ids must be integers"),
    "bool": (lambda: MODEL(ids().bool()), "input_ids must be integers"),
    "labels int16": (lambda: MODEL(ids(), labels=ids().short()), "labels must be int64"),
    "labels -1": (lambda: MODEL(ids(), labels=ids() * 0 - 1), "labels must lie in"),
    "keep 1.5": (lambda: MODEL(ids(), logits_to_keep=1.5), "logits_to_keep must be an integer"),
    "keep words": (lambda: MODEL(ids(), logits_to_keep="1"), "logits_to_keep must be an integer"),
    "items 0": (lambda: MODEL(ids(), labels=ids(), num_items_in_batch=0), "num_items_in_batch must be positive"),
    "items -1": (lambda: MODEL(ids(), labels=ids(), num_items_in_batch=-1), "num_items_in_batch must be positive"),
    "items nan": (lambda: MODEL(ids(), labels=ids(), num_items_in_batch=NAN), "num_items_in_batch must be positive"),
    "complex": (lambda: MODEL(inputs_embeds=torch.ones(1, 3, 12, dtype=torch.complex64)), "inputs_embeds must be fl"),
    "prompt masked": (lambda: MODEL.generate(ids(), attention_mask=ids() * 0), "attention_mask leaves a row"),
    "temperature tensor": (lambda: MODEL.generate(ids(), temperature=torch.tensor(1.0)), "temperature must be"),
    "window 1": (lambda: WindowDataset(TEXTS, 1), "length: 1 must be"),
    "window 2.5": (lambda: WindowDataset(TEXTS, 2.5), "length: 2.5 must be an integer"),
    "no windows": (lambda: WindowDataset(TEXTS, 4, n_windows=0), "n_windows: 0"),
    "no streams": (lambda: StreamDataset(TEXTS, 4, 0, 0.3), "streams: 0"),
    "fresh nan": (lambda: StreamDataset(TEXTS, 4, 1, NAN), "fresh: nan"),
    "evaluation too long": (lambda: evaluation_windows(TEXTS, 4000), "length: 4000 is more than"),
    "evaluation of none": (lambda: evaluation_windows(TEXTS, 4, 0), "n: 0"),
    "text None": (lambda: TokenDocuments.from_texts([None], BYTES), "texts: must be strings, got NoneType"),
    "text of bytes": (lambda: TokenDocuments.from_texts([b"abc"], BYTES), "texts: must be strings, got bytes"),
    "no text": (lambda: TokenDocuments.from_texts(iter(()), BYTES), "no document holds any text"),
    "~nobody": (lambda: load_documents("~nobody/x.txt"), "~nobody"),
    "schedule nan": (lambda: get_cosine_schedule_with_warmup(build_optimizer(MODEL), 0, 10, NAN), "min_lr_ratio"),
    "no steps": (lambda: get_cosine_schedule_with_warmup(build_optimizer(MODEL), 0, 0), "total_steps"),
    "frozen": (lambda: build_optimizer(small("MAC").requires_grad_(False)), "no parameter requires a gradient"),
    "preset None": (lambda: TitansConfig.preset(None), "preset must be one of"),
    "save to no name": (lambda: MODEL.save_pretrained(""), "path: is empty"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    call, message = CALLS[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call()


FILES = {
    "yaml, key twice": (
        "c.yaml",
        b"d_model: 8\nd_model: 16",
        TitansConfig.from_yaml,
        "c.yaml: not YAML: 'd_model' is gi",
    ),
    "yaml, a list": ("c.yaml", b"- 1", TitansConfig.from_yaml, "c.yaml: expected a mapping"),
    "yaml, cut off": ("c.yaml", b"d_model: [", TitansConfig.from_yaml, "c.yaml: not YAML"),
    "yaml, latin-1": ("c.yaml", b"variant: \xe9", TitansConfig.from_yaml, "c.yaml"),
    "yaml, code": ("c.yaml", b"!!python/object/apply:os.system [ls]", TitansConfig.from_yaml, "c.yaml: not YAML"),
    "yaml, deep": ("c.yaml", b"[" * 9999, TitansConfig.from_yaml, "c.yaml: nested too deeply"),
    "json, key twice": ("c.json", b'{"d_model": 8, "d_model": 16}', TitansConfig.from_json, "'d_model' is given twice"),
    "json, deep": ("c.json", b"[" * 99_999, TitansConfig.from_json, "c.json is not JSON"),
    "json, latin-1": ("c.json", b'{"variant": "\xe9"}', TitansConfig.from_json, "c.json is not JSON"),
    "text, UTF-16": ("t.txt", "hello ".encode("utf-16") * 99, load_documents, "t.txt is UTF-16"),
    "jsonl, UTF-16": ("t.jsonl", '{"text": "a"}\n'.encode("utf-16") * 9, load_documents, "t.jsonl is UTF-16"),
    "jsonl, the word NaN": ("t.jsonl", b'{"text": NaN}\n' * 9, load_documents, "line 1 has no text"),
    "text, empty": ("t.txt", b"", load_documents, "holds no text"),
    "text, a BOM alone": ("t.txt", b"\xef\xbb\xbf", load_documents, "holds no text"),
    "run, BOM and tab": ("r.yaml", b"\xef\xbb\xbfmodel:\n\t- 1", TrainConfig.load, "r.yaml: not YAML"),
    "run, an anchor of itself": ("r.yaml", b"model: &a {b: *a}", TrainConfig.load, "r.yaml"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    file, content, read, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises((ValueError, ConfigError), match=message) as error:
        read(tmp_path / file)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    MODEL.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "names no weights beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names no weights beside it"),
        ({"weight_map": {}}, "names no weights beside it"),
        ({"weight_map": {"a": 5}}, "names no weights beside it"),
        ({"weight_map": ["model.safetensors"]}, "is no index of weights"),
        ({}, "is no index of weights"),
        ([], "is no index of weights"),
        ("[" * 9999, "is no index of weights"),
    ],
)
def test_an_index_of_weights_leads_nowhere_else(folder, told, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(told if isinstance(told, str) else json.dumps(told))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_weights_that_swap_places_are_noticed_where_shapes_tell(folder):
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    tensors = load_file(file)
    one, two = "model.blocks.0.ffn.up.weight", "model.blocks.0.ffn.down.weight"
    save_file({**tensors, one: tensors[two], two: tensors[one]}, file, told)
    with pytest.raises(ValueError, match="does not fit its config.json"):
        load_model(folder)


def test_writers_that_fail_leave_what_was_there(tmp_path):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("cut off")

    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError, match="cut off"):
        write_whole(tmp_path / "file", fail)
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nothing", lambda path: None)
    with pytest.raises(OSError, match="too long"):
        write_whole(tmp_path / ("x" * 300), fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_links_loops_and_pipes_in_a_corpus_are_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("abc " * 100)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.txt").symlink_to("/nowhere/x.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert len(load_documents(tmp_path)) == 1


def test_a_state_file_with_one_more_byte_or_a_link_to_itself(tmp_path):
    state().save(tmp_path / "s.st")
    with (tmp_path / "s.st").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"s\.st"):
        ModelState.load(tmp_path / "s.st")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(FileNotFoundError, match="link"):
        ModelState.load(tmp_path / "link")
