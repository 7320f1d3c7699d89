"""Cases thought up by somebody who wants to break things: each ends in one error that names what is wrong.

`CAUSES` says for every cause that a hostile test of the whole library found (A silent wrong results, B lost or mixed
data, C code of strangers, D tracebacks, E crashes, F misleading messages, G configurations and API, H raw errors) where
a test of its kind stands.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from tiny import ids, small
from titans import TitansConfig, load_memory
from titans.data import StreamDataset, TokenDocuments, WindowDataset, evaluation_windows, load_documents, load_tokenizer
from titans.files import hash_tensors, write_whole
from titans.models import ModelState, load_model
from titans.training import build_optimizer, get_cosine_schedule_with_warmup
from titans.training.config import ConfigError, TrainConfig

RESUME, CARRY, SIGNALS = "training/test_resume.py", "training/test_carry.py", "cli/test_signals.py"
STATES, LOAD, RUNS = "models/test_states.py", "models/test_load.py", "test_hostile_runs.py"
CALLED, INPUTS = "test_bad_calls.py", "test_bad_inputs.py"
DAMAGES = "test_every_damage_of_every_file_is_named_and_the_checkpoint_before_taken"
CAUSES = {
    "A1": (RESUME, DAMAGES),  # a checkpoint without its optimizer
    "A2": (CARRY, "test_a_checkpoint_without_its_states_is_passed_over_by_name"),  # missing, swapped, of another step
    "A3": ("hf/test_adapter.py", "test_a_folder_with_other_tensors_is_refused"),  # missing tensors were random memory
    "A4": (STATES, "test_rows_of_another_model_are_not_put_in"),
    "A5": ("models/test_packed.py", "test_a_state_belongs_to_the_weights_that_made_it"),
    "A6": (STATES, "test_a_loaded_state_has_nothing_to_do_with_its_file"),  # aliased the file; also E2
    "A7": ("data/test_documents.py", "test_large_vocabularies_and_long_tokens"),  # ids above 65,535 wrapped
    "A8": (RESUME, "test_auto_without_an_accelerator_is_the_cpu"),
    "A9": (RESUME, "test_a_changed_corpus_and_another_number_of_processes_are_refused"),
    "A10": (RESUME, "test_a_changed_corpus_and_another_number_of_processes_are_refused"),
    "A11": ("data/test_corpora.py", "test_a_folder_that_cannot_be_read_is_an_error_not_a_smaller_corpus"),
    "A12": (INPUTS, "test_train_names_the_setting"),  # an empty source was the working directory
    "A13": (CALLED, "test_a_memory_mode_that_is_none_is_refused_and_the_model_left_as_it_was"),
    "A14": (CALLED, "test_the_drop_in_refuses_what_it_would_misread"),  # a temperature below 0
    "A15": (CALLED, "test_the_drop_in_refuses_what_it_would_misread"),  # a cache whose rows stand apart
    "A16": (STATES, "test_any_bit_that_flipped_is_noticed"),
    "A17": (LOAD, "test_settings_of_another_model_are_refused_whoever_wrote_and_reads"),
    "A18": (STATES, "test_the_state_of_another_layer_is_refused"),
    "A19": (STATES, "test_gates_and_inputs_out_of_range_are_named"),  # masks: test_bad_calls.py
    "A20": ("test_hostile.py", "test_a_weight_that_is_no_number_gives_no_token"),
    "A21": (RUNS, "test_a_text_shorter_than_a_window_is_refused_without_an_evaluation_too"),
    "A22": ("data/test_corpora.py", "test_texts_are_read_as_they_stand"),
    "A23": ("training/test_config.py", "test_a_key_given_twice_is_named"),
    "B1": (RESUME, "test_a_file_of_somebody_else_is_never_replaced"),
    "B2": (RESUME, "test_a_folder_where_a_file_belongs_is_refused_first"),
    "B3": ("models/test_folder.py", "test_a_reader_finds_the_old_model_or_the_new_or_none"),
    "B4": (RESUME, "test_a_model_of_another_run_that_is_there_stays_until_the_new_one_is_whole"),
    "B5": (RESUME, "test_two_runs_never_share_a_folder"),
    "B6": (RESUME, "test_a_runs_output_is_never_its_input"),
    "B7": (RESUME, "test_a_bad_line_of_the_metrics_costs_that_line_alone"),
    "B8": ("test_hostile.py", "test_a_full_disk_is_named_with_the_file"),
    "B9": (STATES, "test_writing_touches_nothing_else"),  # fixed names aside, writers at once, links
    "B10": (STATES, "test_files_have_the_permissions_of_the_umask"),
    "B11": (RESUME, "test_a_display_that_breaks_ends_no_run"),  # and test_signals.py
    "B12": ("training/test_config.py", "test_home_is_expanded_as_in_a_shell"),
    "B13": (LOAD, "test_no_bit_of_a_weight_is_lost_and_the_state_saved_beside_it_fits"),
    "C1": (INPUTS, "test_a_bad_tokenizer_is_named_and_runs_nothing"),
    "C2": (CARRY, "test_a_checkpoint_with_a_forged_manifest_is_refused_in_one_line"),
    "D1": (INPUTS, "test_any_folder_name_will_do"),
    "D2": (INPUTS, "test_every_number_has_its_range"),  # nan and inf; D14, D15 too
    "D3": (INPUTS, "test_output_survives_any_encoding_width_and_pipe"),
    "D4": ("data/test_text_stream.py", "test_ids_that_are_no_bytes_are_shown_as_such"),
    "D5": (RESUME, "test_a_folder_that_cannot_be_written_is_named_before_anything_is_read"),
    "D6": (RESUME, "test_a_file_of_somebody_else_is_never_replaced"),  # OUTPUT/model a file
    "D7": (RUNS, "test_a_checkpoint_that_is_no_folder_is_refused_first"),
    "D8": (RESUME, DAMAGES),  # empty and truncated files
    "D9": (RESUME, DAMAGES),  # trainer_state.json
    "D10": (RUNS, "test_metrics_that_are_lost_cost_no_model"),
    "D11": ("test_hostile.py", "test_a_forged_state_file_is_refused"),  # edited ones: test_states.py
    "D12": ("models/test_models.py", "test_a_tiny_temperature_takes_the_likeliest_token"),
    "D13": (INPUTS, "test_a_model_that_no_machine_holds_is_one_line"),
    "D14": (INPUTS, "test_train_names_the_setting"),  # ffn_mult
    "D15": (INPUTS, "test_every_number_has_its_range"),
    "D16": (INPUTS, "test_train_names_the_setting"),  # miras={bias: {name: [l2]}}
    "D17": (INPUTS, "test_a_bad_configuration_file_is_named"),  # nested too deeply; every other file beside it
    "D18": (INPUTS, "test_a_bad_tokenizer_is_named_and_runs_nothing"),
    "D19": ("data/test_streams.py", "test_half_a_character_is_a_question_mark_as_in_training"),
    "D20": (INPUTS, "test_a_bad_download_is_named"),
    "D21": (INPUTS, "test_output_survives_any_encoding_width_and_pipe"),
    "D22": ("experiments/test_runner.py", "test_a_file_that_is_no_unit_is_named"),
    "D23": (CARRY, "test_a_checkpoint_with_a_forged_manifest_is_refused_in_one_line"),
    "D24": (INPUTS, "test_an_engine_without_its_compiler_is_one_line"),
    "D25": ("training/test_processes.py", "test_half_a_launch_is_one_line"),
    "E1": (INPUTS, "test_train_names_the_setting"),  # threads=100000
    "E2": (STATES, "test_a_loaded_state_has_nothing_to_do_with_its_file"),
    "E3": ("models/test_threads.py", "test_a_probe_disturbs_nobody_and_nobody_the_probe"),
    "F1": (SIGNALS, "test_a_file_that_ends_too_early_is_no_interruption"),
    "F2": (RESUME, DAMAGES),  # config.json missing
    "F3": (RUNS, "test_the_blame_is_where_it_belongs"),
    "F4": ("training/test_folders.py", "test_every_reader_opens_every_folder"),
    "F5": (LOAD, "test_a_damaged_configuration_is_named_by_its_file"),
    "F6": (INPUTS, "test_a_bad_config_of_a_model_is_named"),  # a value of 300 kB
    "F7": (INPUTS, "test_info_says_the_same_at_any_width"),
    "F8": (RUNS, "test_what_is_missing_is_said_with_and_without_a_name"),
    "F9": (INPUTS, "test_a_bad_download_is_named"),  # empty
    "F10": (CARRY, "test_a_checkpoint_without_its_states_is_passed_over_by_name"),
    "G1": (INPUTS, "test_a_refused_assignment_changes_nothing"),
    "G2": ("models/test_faces.py", "test_a_built_models_configuration_does_not_change_unseen"),
    "G3": ("titans_miras/test_config.py", "test_a_value_without_meaning_is_refused"),
    "G4": ("hf/test_adapter.py", "test_a_configuration_is_built_from_fields_under_either_name"),
    "G5": ("models/test_faces.py", "test_a_folder_of_another_variant_is_refused"),
    "G6": (CALLED, "test_a_memory_mode_that_is_none_is_refused_and_the_model_left_as_it_was"),
    "G7": ("test_hostile.py", "test_labels_may_be_as_wide_as_ids"),
    "G8": (CALLED, "test_python_callers_get_one_clear_error"),
    "H": (CALLED, "test_callers_of_a_model_get_one_clear_error"),
}  # fmt: skip


def test_every_cause_has_its_test():
    for cause, (file, name) in CAUSES.items():
        assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), cause


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
    "load a folder": (lambda s: ModelState.load("/"), "is not a regular file"),
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
    "items tensor": (
        lambda: MODEL(ids(), labels=ids(), num_items_in_batch=torch.tensor(-3)),
        "num_items_in_batch must be positive",
    ),
    "items words": (lambda: MODEL(ids(), labels=ids(), num_items_in_batch="3"), "num_items_in_batch must be positive"),
    "memorize bytes": (lambda: MODEL.memorize(b"abc"), "text must be a string, ids, or arrays of ids, got bytes"),
    "memorize None": (lambda: MODEL.memorize(None), "text must be a string, ids, or arrays of ids, got NoneType"),
    "memorize floats": (lambda: MODEL.memorize([np.array([1.5])]), r"arrays of integers .* got float64 \[1\]"),
    "memorize lists": (lambda: MODEL.memorize([[1, 2]]), "arrays of integers .* got list"),
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


def test_a_state_file_with_one_more_byte_or_a_link_to_itself(tmp_path):
    state().save(tmp_path / "s.st")
    with (tmp_path / "s.st").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"s\.st"):
        ModelState.load(tmp_path / "s.st")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(FileNotFoundError, match="link"):
        ModelState.load(tmp_path / "link")


@pytest.mark.parametrize("variant", ["transformer", "swa", "MAC", "LMM"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_weight_that_is_no_number_gives_no_token(variant, temperature):
    model = small(variant, tie_embeddings=False)
    with torch.no_grad():
        model.head.weight[3] = NAN
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        model.generate(ids(1, 3), 2, temperature=temperature)


def test_labels_may_be_as_wide_as_ids():
    expected = MODEL(ids(), labels=ids()).loss
    assert torch.equal(MODEL(ids().int(), labels=ids().int()).loss, expected)


def forge(path, change):
    """Change a state file and give it the hash of what it then holds."""
    content = path.read_bytes()
    told = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = load(content)
    change(tensors, told)
    del told["hash"]
    save_file(tensors, path, {**told, "hash": hash_tensors(tensors, told)})


WEIGHTS = "layers[0].memory.memory.weights[0]"
FORGED = {
    **{f"layers={v}": lambda t, told, v=v: told.update(layers=v) for v in ("[]", "[5]", "[null]", '["x"]', "[[1]]", "5",
        "[{}]", '[{"kind": "MACState"}]', '[{"kind": ["x"]}]', "[" * 9999)},
    **{f"seen={v}": lambda t, told, v=v: told.update(seen=v) for v in ("[]", "5", "null", "[-1, 1]", "[1.5, 1]",
        "[[1]]", '["x"]', "[1]", "[1e400, 1]", "[99999999999999999999, 1]")},
    "missing": lambda t, told: t.pop(WEIGHTS),
    "nan": lambda t, told: t.update({WEIGHTS: t[WEIGHTS] * NAN}),
    "integers": lambda t, told: t.update({WEIGHTS: t[WEIGHTS].int()}),
    "complex": lambda t, told: t.update({WEIGHTS: t[WEIGHTS].to(torch.complex64)}),
    "narrower": lambda t, told: t.update({WEIGHTS: t[WEIGHTS][..., 1:].contiguous()}),
    "one row more": lambda t, told: t.update({WEIGHTS: torch.cat([t[WEIGHTS]] * 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_state_file_is_refused(tmp_path, name):
    state().save(tmp_path / "s.st")
    assert load_memory(tmp_path / "s.st", MODEL).seen == state().seen
    forge(tmp_path / "s.st", FORGED[name])
    with pytest.raises(ValueError, match=r"s\.st"):
        load_memory(tmp_path / "s.st", MODEL)


FULL = """
import resource, sys
from titans import TitansMAC
import torch
model = TitansMAC(64, d_model=16, n_layers=1, chunk_size=4)
state = model(torch.zeros(1, 9, dtype=torch.long)).state.detach()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write, path in ((state.save, sys.argv[1] + "/s.st"), (model.save_pretrained, sys.argv[1] + "/model")):
    try:
        write(path)
    except OSError as error:
        print(error)
"""


def test_a_full_disk_is_named_with_the_file(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=100)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("File too large" in line for line in lines), done.stderr
    assert "s.st" in lines[0] and "model" in lines[1] and list(tmp_path.iterdir()) == []
