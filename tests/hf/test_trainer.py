"""transformers' Trainer as it comes, and PEFT's adapters."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from helpers import assert_close
from tiny import ALL, VARIANTS
from titans.models import load_model

SETTINGS = {
    "max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "log_level": "error",
    "max_grad_norm": 0, "lr_scheduler_type": "constant", "save_strategy": "no", "logging_strategy": "no",
}  # fmt: skip


class Uneven(torch.utils.data.Dataset):
    """Four texts, of which every other has few targets."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 64, (20,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: 0 if index % 2 else 15] = -100
        return {"input_ids": ids, "labels": labels}


def step(model, folder, **arguments) -> torch.Tensor:
    """How far one step of plain gradient descent moves the embedding."""
    before = model.model.embedding.weight.detach().clone()
    settings = {**SETTINGS, "optim": "sgd", "learning_rate": 1.0, **arguments}
    Trainer(model=model, args=TrainingArguments(str(folder), **settings), train_dataset=Uneven()).train()
    return before - model.model.embedding.weight.detach()


def test_accumulated_uneven_batches_step_as_one_large_batch(make, tmp_path):
    whole, *parts = (
        step(make(), tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=4 // rows)
        for rows in (4, 2, 1)
    )
    for part in parts:
        assert_close(part, whole)


@pytest.mark.parametrize("arguments", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_checkpointing_and_bf16_step_alike(make, tmp_path, arguments):
    rows = {"per_device_train_batch_size": 4}
    moved, plain = step(make(), tmp_path, **rows, **arguments), step(make(), tmp_path, **rows)
    assert torch.cosine_similarity(moved.flatten(), plain.flatten(), 0) > 0.95
    assert torch.equal(moved, plain) == ("bf16" not in arguments)


def test_it_saves_and_resumes_what_every_reader_opens(make, tmp_path):
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 1}
    for steps in (1, 2):
        arguments = TrainingArguments(str(tmp_path), **{**settings, "max_steps": steps})
        trainer = Trainer(model=make(), args=arguments, train_dataset=Uneven())
        trainer.train(resume_from_checkpoint=steps > 1)
    ids = Uneven()[0]["input_ids"][None]
    expected = trainer.model.eval()(ids).logits
    for read in (load_model, AutoModelForCausalLM.from_pretrained):
        assert_close(read(tmp_path / "checkpoint-2")(ids).logits, expected)


def test_metrics_and_generation_in_evaluation(make, tmp_path):
    arguments = TrainingArguments(str(tmp_path), **SETTINGS)
    trainer = Trainer(
        model=make(), args=arguments, eval_dataset=Uneven(), compute_metrics=lambda p: {"rows": len(p.predictions)}
    )
    assert trainer.evaluate()["eval_rows"] == 4
    assert trainer.predict(Uneven()).predictions.shape == (4, 20, 64)
    settings = {**SETTINGS, "predict_with_generate": True, "generation_max_length": 24}
    arguments = Seq2SeqTrainingArguments(str(tmp_path), **settings)
    seq2seq = Seq2SeqTrainer(model=make(), args=arguments, eval_dataset=Uneven())
    assert seq2seq.predict(Uneven()).predictions.shape == (4, 24)


@pytest.mark.parametrize("variant", ALL)
def test_lora_on_all_linear_maps_trains_saves_and_merges(make, tmp_path, ids, variant):
    """The head is left alone: where it is tied, an adapter on it would be merged into the embedding too."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft.get_peft_model(
        make(variant=variant), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    ).train()
    assert not any("head" in name for name, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    tuned = model(input_ids=ids).logits
    assert model.generate(input_ids=ids, max_new_tokens=2).shape == (2, 23)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make(variant=variant), tmp_path / "adapter")
    assert_close(again(input_ids=ids).logits, tuned)
    merged = model.merge_and_unload()
    assert_close(merged(ids).logits, tuned, tolerance=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged")(ids).logits, tuned, tolerance=1e-5)


@pytest.mark.parametrize("variant", ALL)
def test_lora_without_targets_takes_the_projections(make, ids, variant):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft.get_peft_model(make(variant=variant), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    attention, memory = {"q", "kv", "out"}, {"qkv", "out"}
    assert adapted == (memory if variant == "LMM" else attention | (memory if variant in VARIANTS else set()))
    model.eval()
    tuned = model(input_ids=ids).logits
    assert (tuned - make(variant=variant)(ids).logits).abs().max() > 1e-2
    assert_close(model.merge_and_unload()(ids).logits, tuned, tolerance=1e-5)


def test_int8_by_torchao_computes_and_generates(make, ids):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, expected = make(), make()(ids).logits
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert_close(model(ids).logits, expected, tolerance=0.1)
    assert model.generate(ids, max_new_tokens=2).shape == (2, 23)


def test_prompt_tuning_trains_and_generates(make, ids):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft.get_peft_model(make(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
    assert model.generate(input_ids=ids, max_new_tokens=2).shape == (2, 23)
