"""EleutherAI's lm-eval opens a folder through both doors and completes each kind of task, offline."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import titans
from titans.data import ByteTokenizer
from titans.models import TitansConfig, build_model, load_model
from titans.training.data import save_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TEXT = "the memory reads what surprises it " * 30
DOCUMENTS = [
    {"question": "one two", "choices": ["three", "four"], "gold": 0, "text": TEXT},
    {"question": "red", "choices": ["a", "longer answer"], "gold": 1, "text": "and forgets"},
]
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "roll": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    config = TitansConfig(vocab_size=256, d_model=16, n_layers=1, chunk_size=8, n_persistent=2, segment_len=16)
    build_model(config).save_pretrained(place / "model")
    save_tokenizer(ByteTokenizer(), place / "model")
    (place / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (place / "tasks").mkdir()
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {place / 'documents.jsonl'}}}}}\n"
        (place / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test\n{text}")
    return place


def run(folder, module, *arguments):
    source = str(Path(titans.__file__).parents[1])
    environment = {
        **os.environ, "PYTHONPATH": source, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"), "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1",
    }  # fmt: skip
    command = [
        *(sys.executable, "-m", module, "--tasks", ",".join(TASKS), "--include_path", str(folder / "tasks")),
        *("--device", "cpu", "--batch_size", "2", "--output_path", str(folder / "out" / module), *arguments),
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    (written,) = (folder / "out" / module).rglob("results*.json")
    return json.loads(written.read_text())["results"]


@pytest.mark.parametrize(
    ("module", "model", "more"),
    [("lm_eval", "hf", ",trust_remote_code=True"), ("titans.evaluation.lm_eval", "titans", "")],
)
def test_both_doors_complete_every_kind_of_task(folder, module, model, more):
    results = run(folder, module, "--model", model, "--model_args", f"pretrained={folder / 'model'}{more}")
    assert set(results) == set(TASKS)
    nats, size = 0.0, 0
    core = load_model(folder / "model")
    for document in DOCUMENTS:
        ids = torch.tensor([[0, *document["text"].encode()]])
        with torch.no_grad():
            nats += core(ids, labels=ids).loss.double().item() * (ids.shape[1] - 1)
        size += ids.shape[1] - 1
    assert results["roll"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-6)


def test_rolling_is_our_own_evaluation_whatever_the_piece(folder, monkeypatch):
    from titans.evaluation.lm_eval import TitansLM
    from titans.evaluation.perplexity import nats_by_position

    found = []
    for piece in (16, 48, 2**14):
        monkeypatch.setattr("titans.evaluation.lm_eval.READ_AT_ONCE", piece)
        found.append(TitansLM(str(folder / "model"), device="cpu").nats(DOCUMENTS[0]["text"]))
    ids = torch.tensor([[0, *DOCUMENTS[0]["text"].encode()]])
    expected = nats_by_position(load_model(folder / "model"), [ids], segment=16).sum().item()
    assert found == pytest.approx([expected] * 3, rel=1e-6)
    assert TitansLM(str(folder / "model"), device="cpu").nats("") == 0


@pytest.mark.parametrize("door", ["hf", "titans"])
def test_a_long_request_reaches_the_model_whole(folder, door):
    from lm_eval.models.huggingface import HFLM

    from titans.evaluation.lm_eval import TitansLM

    model, lengths = (HFLM if door == "hf" else TitansLM)(str(folder / "model"), device="cpu"), []
    model.model.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    (answer,) = model._loglikelihood_tokens([(("a", "b"), [1] * 16_000, [2] * 384)])
    assert lengths == [16_383] and answer[0] < 0


def test_an_adapter_is_read_with_its_model(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from transformers import AutoModelForCausalLM

    from titans.evaluation.lm_eval import TitansLM

    text = DOCUMENTS[0]["text"]
    plain = TitansLM(str(folder / "model"), device="cpu").nats(text)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False)).save_pretrained(tmp_path)
    adapted = TitansLM(str(folder / "model"), device="cpu", peft=str(tmp_path))
    ids = torch.tensor([[0, *text.encode()]])
    with torch.no_grad():
        expected = adapted.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert adapted.nats(text) == pytest.approx(expected, rel=1e-5) and abs(plain / expected - 1) > 1e-3


def test_a_grafted_decoder_is_read_with_its_memories_through_both_doors(tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from decoders import opened, pretrained
    from titans.evaluation.lm_eval import TitansLM
    from titans.evaluation.perplexity import nats_by_position

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = opened("llama")
    for made, name in ((model, "grafted"), (pretrained("llama"), "plain")):
        made.resize_token_embeddings(256)
        made.save_pretrained(tmp_path / name)
        save_tokenizer(ByteTokenizer(), tmp_path / name)
    ids = torch.tensor([[0, *TEXT[:90].encode()]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    monkeypatch.setattr("titans.evaluation.lm_eval.READ_AT_ONCE", 16)
    ours = TitansLM(str(tmp_path / "grafted"), device="cpu")
    assert ours.nats(TEXT[:90]) == pytest.approx(expected, rel=1e-6)
    own = nats_by_position(load_model(tmp_path / "grafted"), [ids], segment=16).sum().item()
    assert ours.nats(TEXT[:90]) == pytest.approx(own, rel=1e-6)
    theirs = HFLM(str(tmp_path / "grafted"), device="cpu", trust_remote_code=True)
    (answer,) = theirs._loglikelihood_tokens([(("a", "b"), ids[0, :1].tolist(), ids[0, 1:].tolist())])
    assert answer[0] == pytest.approx(-expected, rel=1e-5)
    with pytest.raises(ValueError, match="positions for 128 tokens, got 144"):
        ours.nats(TEXT[:150])  # the ninth piece of 16
    with pytest.raises(ValueError, match="decoder with memories.* got llama"):
        TitansLM(str(tmp_path / "plain"), device="cpu")
