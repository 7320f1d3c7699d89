"""The Auto classes give back what was saved, and the adapter computes what the model computes."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import assert_close
from titans.hf import TitansForCausalLM, TitansHFConfig, register
from titans.miras import MirasConfig
from titans.models import TitansConfig, load_model
from titans.models.semantics import SEMANTICS


def tiny(**changes) -> TitansForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "chunk_size": 4, "n_persistent": 2, **changes}
    return TitansForCausalLM(TitansHFConfig(TitansConfig(**fields))).eval()


@pytest.mark.parametrize(
    ("variant", "tied"), [("LMM", True), ("MAC", False), ("MAG", True), ("MAL", False), ("transformer", True)]
)
def test_saved_and_loaded_by_the_auto_classes_it_is_the_same(tmp_path, variant, tied):
    model = tiny(variant=variant, tie_embeddings=tied, miras=MirasConfig.titans())
    ids = torch.randint(0, 40, (2, 11))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TitansHFConfig)
    assert loaded.config.core() == model.config.core()
    assert (loaded.model.head.weight is loaded.model.embedding.weight) == tied
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert_close(loaded(ids).logits, model(ids).logits)  # loaded tensors lie otherwise aligned: not bit for bit


@pytest.mark.parametrize("made_for", ["2", None])
def test_a_folder_made_for_other_semantics_is_refused(tmp_path, made_for):
    """Its weights would load, or stay uninitialised, and compute something else."""
    tiny().save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told.pop("semantics") == SEMANTICS
    (tmp_path / "config.json").write_text(json.dumps(told | ({"semantics": made_for} if made_for else {})))
    with pytest.raises(ValueError, match=f"semantics {made_for or 1} of its configuration, this is {SEMANTICS}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_it_passes_everything_to_the_model_and_back():
    model = tiny()
    ids = torch.randint(0, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = model(ids, attention_mask=mask, labels=ids)
    expected = model.model(ids, attention_mask=mask, labels=ids)
    assert_close(out.loss, expected.loss)
    assert_close(out["logits"], expected.logits)
    assert "loss" not in model(ids)
    first = model(ids[:, :4])
    assert_close(model(ids[:, 4:], state=first.state).logits, model(ids).logits[:, 4:])
    assert model(ids, logits_to_keep=2).logits.shape == (2, 2, 40)
    assert torch.equal(
        model.generate(ids, max_new_tokens=3, temperature=0), model.model.generate(ids, max_new_tokens=3, temperature=0)
    )


def test_the_inner_model_saves_in_the_projects_own_format(tmp_path):
    model = tiny()
    model.model.save_pretrained(tmp_path)
    ids = torch.randint(0, 40, (1, 9))
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)


def test_registering_again_changes_nothing():
    register()
    register()
    assert AutoConfig.for_model("titans").core() == TitansConfig().explicit()
