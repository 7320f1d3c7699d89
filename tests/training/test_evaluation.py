"""What an evaluation scores: the targets inside documents, their own bytes, and streams where state is carried."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from runs import metrics, quiet
from titans.data import TokenDocuments, load_documents, load_tokenizer
from titans.hf import TitansForCausalLM
from titans.models import load_model
from titans.training.data import EvaluationStreams, RunData, collate
from titans.training.run import train

LENGTHS = (130, 24, 75, 60, 240, 49)


@pytest.fixture
def documents() -> TokenDocuments:
    generator = torch.Generator().manual_seed(0)
    texts = [bytes(torch.randint(97, 123, (n,), generator=generator).tolist()).decode() for n in LENGTHS]
    return TokenDocuments.from_texts(texts, load_tokenizer("bytes"))


class Packed(Dataset):
    """Three windows of random tokens, the second of three documents; other bytes than tokens."""

    fingerprint = "three windows"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 256, (24,), generator=torch.Generator().manual_seed(index))
        owners = torch.zeros(24, dtype=torch.int64) if index != 1 else torch.tensor([0] * 9 + [1] * 10 + [2] * 5)
        labels = ids.clone()
        labels[1:][owners[1:] != owners[:-1]] = -100
        return {"input_ids": ids, "labels": labels, "document_ids": owners, "bytes": torch.tensor(50 + index)}

    def __len__(self) -> int:
        return 3


def test_a_batch_keeps_document_ids_only_where_a_row_has_several():
    items = Packed()
    plain, packed = collate([items[0], items[2]]), collate([items[0], items[1]])
    assert set(plain) == {"input_ids", "labels", "bytes"}
    assert packed["document_ids"].shape == packed["labels"].shape == (2, 24)


@pytest.mark.parametrize("takes", [True, False])
def test_evaluation_scores_inside_documents_by_their_own_bytes(make_config, documents, monkeypatch, takes):
    data = RunData(documents, Packed(), load_tokenizer("bytes"))
    monkeypatch.setattr("titans.training.run.load_data", lambda config: data)
    given, forward = [], TitansForCausalLM.forward

    def with_documents(self, input_ids, labels=None, state=None, document_ids=None):
        if not self.training:
            given.append(None if document_ids is None else document_ids.tolist())
        return forward(self, input_ids, labels=labels, state=state)

    def without_documents(self, input_ids, labels=None, state=None):
        return with_documents(self, input_ids, labels, state)

    monkeypatch.setattr(TitansForCausalLM, "forward", with_documents if takes else without_documents)
    config = make_config("run", "training.steps=1", "training.eval_every=1")
    model = load_model(train(config, console=quiet()).model_dir)
    owners = [Packed()[i]["document_ids"].tolist() for i in range(2)]
    assert given == ([owners, None] if takes else [None, None])
    nats, targets = 0.0, 0
    for item in (Packed()[i] for i in range(3)):
        inside = item["document_ids"][1:] == item["document_ids"][:-1]
        with torch.no_grad():
            logits = model(item["input_ids"][None]).logits[0, :-1]
        nats += F.cross_entropy(logits[inside], item["input_ids"][1:][inside], reduction="sum").item()
        targets += int(inside.sum())
    assert targets == 3 * 23 - 2
    last = metrics(config.training.output_dir)[-1]
    assert last["eval_loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert last["eval_bpb"] == pytest.approx(nats / math.log(2) / (50 + 51 + 52), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize(("n", "tokens"), [(1, 24), (7, 77 + 51), (100, None)])
def test_streams_read_documents_in_order_whatever_the_batch(documents, rows, n, tokens):
    streams = EvaluationStreams(documents, 24, rows, n)
    assert len(streams) % rows == 0
    read: list[list[int]] = []
    current: dict[int, list[int]] = {}
    for index in range(len(streams)):
        item, row = streams[index], index % rows
        scored = item["labels"] != -100  # the first token of a window too, which the shift leaves out
        assert item["bytes"] == max(0, int(scored.sum()) - 1)
        if item["fresh"]:
            current[row] = []
            read.append(current[row])
        current[row].extend(item["labels"][scored].tolist())
    texts = [documents.tokens[a:b].tolist() for a, b in itertools.pairwise(documents.offsets)]
    read = [text for text in read if text]
    if tokens is None:
        assert sorted(read) == sorted(text[:-1] if len(text) % 24 == 1 else text for text in texts)
    else:
        assert sum(map(len, read)) == tokens
        assert all(any(text[: len(part)] == part for text in texts) for part in read)


@pytest.mark.parametrize("variant", ["MAC", "LMM", "swa"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_run_that_carries_state_is_evaluated_on_documents_as_streams(make_config, tmp_path, variant, batch):
    corpus, generator = tmp_path / "corpus", torch.Generator().manual_seed(0)
    corpus.mkdir()
    for split in ("train", "validation"):
        texts = [bytes(torch.randint(97, 123, (n,), generator=generator).tolist()).decode() for n in LENGTHS]
        (corpus / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = make_config(
        "run", f"model.variant={variant}", "model.window=10", f"data.source={corpus}", "training.carry_state=true",
        f"training.batch_size={batch}", "training.steps=2", "training.eval_every=1", "training.eval_tokens=100000",
    )  # fmt: skip
    folder = Path(train(config, console=quiet()).model_dir)
    model = load_model(folder)
    nats, targets = 0.0, 0
    for text in load_documents(corpus, "validation"):
        ids = torch.tensor([[0, *text.encode(), 0]])
        with torch.no_grad():
            losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        scored = torch.arange(1, ids.shape[1]) % 24 != 0  # every token but the first of each window
        nats, targets = nats + losses[scored].sum().item(), targets + int(scored.sum())
    last = metrics(config.training.output_dir)[-1]
    assert last["eval_loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert last["eval_bpb"] == pytest.approx(nats / targets / math.log(2), rel=1e-5)
