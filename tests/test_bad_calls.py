"""Bad arguments of Python callers: each ends in one error that names the argument."""

import re
from functools import cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from titans import MirasConfig, NeuralMemory, PersistentMemory, TitansConfig, count_parameters
from titans.data import ByteTokenizer, TokenDocuments, iid_batch, load_documents, load_tokenizer, mqar_batch
from titans.evaluation import evaluate, nats_by_position, training_batch
from titans.hf.graft import graft, memories, save_graft
from titans.models import build_model
from titans.ops import sliding_window_attention
from titans.state import State
from titans.training import build_optimizer
from titans_miras import MACTransformer, TransformerConfig

MODEL = {"vocab_size": 256, "d_model": 16, "n_layers": 1, "chunk_size": 8, "n_persistent": 2}

NAN = float("nan")
CALLS = {
    **{f"d_model={v!r}": lambda v=v: NeuralMemory(v) for v in (0, -8, 16.0, "16", None, True)},
    **{f"chunk_size={v!r}": lambda v=v: NeuralMemory(16, chunk_size=v) for v in (0, -1, 2.5, "4", None)},
    **{f"conv_kernel={v!r}": lambda v=v: NeuralMemory(16, conv_kernel=v) for v in (-1, 2.5, "4")},
    **{f"n_heads={v!r}": lambda v=v: NeuralMemory(16, n_heads=v) for v in (0, 3, 2.0, "2")},
    **{f"theta_max={v!r}": lambda v=v: NeuralMemory(16, theta_max=v) for v in (0, -1, float("nan"), float("inf"))},
    **{f"miras={v!r}": lambda v=v: NeuralMemory(16, miras=v) for v in ("none", 5, [])},
    **{f"x={type(v).__name__}": lambda v=v: NeuralMemory(16)(v) for v in ([1.0], None, "x", torch.ones(3),
        torch.ones(1, 2, 8))},
    "x: float64": lambda: NeuralMemory(16)(torch.ones(1, 2, 16).double()),
    "x: fewer": lambda: PersistentMemory(4, 16).strip(torch.ones(1, 2, 16)),
    "n_heads: copied": lambda: TitansConfig(**MODEL).model_copy(update={"n_heads": 7}),
    **{f"bias={v!r}": lambda v=v: MirasConfig(bias=v) for v in (5, [], {}, {"name": ["l2"]}, {"name": None}, "l3")},
    **{f"source={v!r}": lambda v=v: load_documents(v) for v in ("", "/nowhere", "PLACE")},
    **{f"vocab: {v}": lambda v=v: iid_batch(1, 2, v, torch.Generator()) for v in (0, -1)},
    **{f"weight_decay: {v}": lambda v=v: build_optimizer(torch.nn.Linear(2, 2), weight_decay=v) for v in (-1, NAN)},
    **{f"n_tokens={v!r}": lambda v=v: PersistentMemory(v, 16) for v in (-1, 2.5, "2")},
    **{f"model={v!r}": lambda v=v: count_parameters(v) for v in (5, None)},
    **{f"config={v!r}": lambda v=v: MACTransformer(config=v) for v in (5, None)},  # type: ignore[arg-type]
    "generator": lambda: mqar_batch(1, 16, 2, 32, None),
    "batch": lambda: mqar_batch(1.5, 16, 2, 32, torch.Generator()),
    "generator: training": lambda: training_batch("mqar_easy", ByteTokenizer(), 1, 64, 5),
    "questions": lambda: training_batch("mqar_easy", ByteTokenizer(), 1, 64, torch.Generator(), questions=2.5),
    "text": lambda: ByteTokenizer().encode(5),
    "window": lambda: sliding_window_attention(*torch.ones(3, 1, 4, 1, 2), 1.5),
    "past_key_values": lambda: memories(5),
    "model: no decoder": lambda: graft(build_model(TitansConfig(**MODEL)), [0]),
    "model: no memories": lambda: save_graft(decoder(), "PLACE"),
    **{f"layers={v!r}": lambda v=v: graft(decoder(), v) for v in ([], [0, 0], 1, [9])},
    **{f"{name}={v!r}": lambda name=name, v=v: evaluated(**{name: v}) for name, v in (("lengths", 32),
        ("lengths", ["1k"]), ("samples", 1.5), ("seed", "x"), ("text", 5), ("model", None), ("tokenizer", None))},
    "texts": lambda: TokenDocuments.from_texts("hello", load_tokenizer()),
    "tokenizer": lambda: load_tokenizer(""),
}  # fmt: skip


def decoder():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))


def evaluated(**changes):
    given = {"model": build_model(TitansConfig(**MODEL)), "tokenizer": ByteTokenizer(), "tasks": ["mqar_easy"]}
    return evaluate(**{**given, "lengths": [32], **changes})


def test_a_graft_that_is_refused_leaves_the_decoder_as_it_was():
    model = decoder()
    with pytest.raises(ValueError, match=r"layers must be among 0\.\.0, each once, got \[0, 0\]"):
        graft(model, [0, 0])
    assert all(p.requires_grad for p in model.parameters()) and type(model) is LlamaForCausalLM


@pytest.mark.parametrize("name", CALLS)
def test_python_callers_get_one_clear_error(name):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        CALLS[name]()
    assert re.split("[=:]", name)[0] in str(error.value)


IDS = torch.ones(1, 9, dtype=torch.long)
MODEL_CALLS = {
    "tokenizer": lambda m: m.memorize("abc", tokenizer=5),
    **{f"input_ids {i}": lambda m, v=v: m(v) for i, v in enumerate(([[1]], None, "x", IDS.float(), IDS[0], IDS + 255,
        IDS - 2))},
    "input_ids meta": lambda m: m(IDS.to("meta")),
    "inputs_embeds float64": lambda m: m(inputs_embeds=torch.ones(1, 9, 16).double()),
    **{f"labels {i}": lambda m, v=v: m(IDS, labels=v) for i, v in enumerate(([[1]], "x", IDS.float(), IDS[:, :3],
        IDS + 255))},
    **{
        f"attention_mask {i}": lambda m, v=v: m(IDS, attention_mask=v)
        for i, v in enumerate(([[1]], "x", IDS[:, :3], (IDS - 1) - 1e9, IDS * 0.5, IDS * float("nan"), IDS * 2))
    },
    **{
        f"store_mask {i}": lambda m, v=v: m(IDS, store_mask=v)
        for i, v in enumerate(([[1]], "x", IDS[:, :3], IDS * 0.5))
    },
    **{f"document_ids {i}": lambda m, v=v: m(IDS, document_ids=v) for i, v in enumerate(([[1]], "x", IDS.float(),
        IDS[:, :3], IDS.bool()))},
    **{f"inputs_embeds {i}": lambda m, v=v: m(inputs_embeds=v) for i, v in enumerate(("x", [1.0], IDS,
        torch.ones(1, 3, 8), torch.ones(1, 3, 16) * NAN, torch.ones(1, 3, 16) / 0, torch.ones(1, 3, 16).long()))},
    "inputs_embeds both": lambda m: m(IDS, inputs_embeds=torch.ones(1, 9, 16)),
    **{f"logits_to_keep {v}": lambda m, v=v: m(IDS, logits_to_keep=v) for v in (-1,)},
    **{f"engine {v}": lambda m, v=v: m.set_engine(v) for v in ("natve", "", None)},
    **{f"rows {v}": lambda m, v=v: m(IDS).state.select(v) for v in (0, [1], [-1], [0.5], [True], "x", None)},
    **{f"copies {v}": lambda m, v=v: m(IDS).state.fork(v) for v in (0, -1, 1.5, None)},
    **{f"put {v}": lambda m, v=v: m(IDS).state.put([0], v) for v in (None, "x", 5)},
    **{f"state {i}": lambda m, v=v: m(IDS, state=v) for i, v in enumerate(("x", 5, (1,)))},
    **{f"eos_token_id {v}": lambda m, v=v: m.generate(IDS, eos_token_id=v) for v in (256, -1, (), (0, 300), "x",
        1.5, True, (True,))},
    **{f"generator {v}": lambda m, v=v: m.generate(IDS, generator=v) for v in (3, "cpu")},
    **{f"temperature {v}": lambda m, v=v: m.generate(IDS, temperature=v) for v in (-1, float("nan"), float("inf"),
        None, "x")},
    **{f"top_k {v}": lambda m, v=v: m.generate(IDS, top_k=v) for v in (0, -1, 2.5, "x", True)},
    **{f"top_p {v}": lambda m, v=v: m.generate(IDS, top_p=v) for v in (0, 1.5, -1, float("nan"), "x")},
    **{f"max_new_tokens {v}": lambda m, v=v: m.generate(IDS, max_new_tokens=v) for v in (-1, 2.5, "x", None, True)},
    **{f"prompt {i}": lambda m, v=v: m.generate(v) for i, v in enumerate((None, "x", [[1]], IDS[0]))},
}  # fmt: skip


@pytest.mark.parametrize("name", MODEL_CALLS)
def test_callers_of_a_model_get_one_clear_error(name):
    with pytest.raises(ValueError, match=name.split()[0].replace("prompt", "prompt|input_ids")):
        MODEL_CALLS[name](build_model(TitansConfig(**MODEL)))


@cache
def _paths():
    """Every call that takes a path, by the argument's name; imports are late, since some need extras."""
    from titans import load_memory
    from titans.data import HuggingFaceTokenizer
    from titans.evaluation import evaluate
    from titans.evaluation.from_memory import read_questions
    from titans.files import hash_file, write_whole
    from titans.hf import TitansForCausalLM, TitansHFConfig, load_graft
    from titans.models import MemoryFile, ModelState, TitansModel, load_model
    from titans.reading import Job
    from titans.training.config import TrainConfig, load_model_config
    from titans.training.data import load_saved_tokenizer

    config = TitansConfig(**MODEL)
    model = build_model(config)
    state = model(IDS).state
    return {
        "path": (
            load_model, TitansModel.from_pretrained, model.save_pretrained, ModelState.load, state.save,
            MemoryFile.open, MemoryFile(state).save, lambda v: load_memory(v, model), TitansConfig.from_json,
            TitansConfig.from_yaml, config.to_json, config.to_yaml, TrainConfig.load, TrainConfig(model=config).to_yaml,
            load_model_config, HuggingFaceTokenizer, read_questions, hash_file, lambda v: write_whole(v, print),
        ),
        "folder": (lambda v: load_graft(None, v),),
        "save_directory": (TitansForCausalLM(TitansHFConfig(config)).save_pretrained,),
        "model_dir": (load_saved_tokenizer,),
        "source": (load_documents,),
        "tokenizer": (load_tokenizer,),
        "output": (lambda v: Job(("a",), v), lambda v: v is None or evaluate(model, load_tokenizer(), ["ppl"], [64],
            output=v)),
        "append": (lambda v: v is None or Job(("a",), "b", v),),
        "data_dir": (lambda v: v is None or load_documents("enwik8", data_dir=v),),
    }  # fmt: skip


@pytest.mark.parametrize("value", [None, 3, 0, True, b"x", [], ""])
def test_what_is_no_path_is_named(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    for name, calls in _paths().items():
        for at, call in enumerate(calls):
            try:
                if call(value) is not True:
                    found[name, at] = "nothing"
            except ValueError as error:
                if not re.search(rf"{name}( must be a path|: is empty|: '' is)", str(error)):
                    found[name, at] = error
            except Exception as error:
                found[name, at] = error
    if value is None:
        for optional in (("output", 1), ("append", 0), ("data_dir", 0)):
            found.pop(optional, None)
    assert not found and not list(tmp_path.iterdir())


def test_a_state_on_another_device_names_both():
    model = build_model(TitansConfig(**MODEL)).eval()
    with torch.no_grad():
        _, decoded = model(IDS), model(IDS[:, :1], state=model(IDS).state).state  # as layers, and as buffers
    for state in (model(IDS).state, decoded):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"state.layers\[0\].* is on meta, the model's block 0 on cpu"):
                call(IDS, state=state.to("meta"))
    model.to("meta")
    with pytest.raises(ValueError, match="is on cpu, the model's block 0 on meta"):
        model(IDS.to("meta"), state=decoded)


def test_a_layers_state_on_another_device_names_both():
    memory, x = NeuralMemory(16), torch.ones(1, 3, 16)
    state = memory(x, return_state=True)[1]
    with pytest.raises(ValueError, match=r"state.memory.* is on meta, x on cpu"):
        memory(x, state=state.to("meta"))
    with pytest.raises(ValueError, match=r"state.memory.* is on cpu, x on meta"):
        memory.to("meta")(x.to("meta"), state=state)


@pytest.mark.parametrize("memory", ["resett", "none", None, True])
def test_a_memory_mode_that_is_none_is_refused_and_the_model_left_as_it_was(memory):
    model = build_model(TitansConfig(**MODEL)).train()
    with pytest.raises(ValueError, match="memory must be one of on, reset, off"):
        nats_by_position(model, [IDS], segment=3, memory=memory)
    assert model.training


@pytest.mark.parametrize("embedding", [torch.nn.Embedding(256, 8), torch.nn.Embedding(32, 16), "x"])
def test_the_drop_in_names_an_embedding_that_does_not_fit(embedding):
    config = TransformerConfig(num_tokens=256, dim=16, depth=1, segment_len=4)
    with pytest.raises(ValueError, match="token_emb must"):
        MACTransformer(config=config, token_emb=embedding)


@pytest.mark.parametrize(("field", "value"), [("dim", 15), ("heads", 3), ("segment_len", 0), ("depth", True)])
def test_an_assignment_that_the_drop_in_refuses_changes_nothing(field, value):
    config = TransformerConfig(num_tokens=256, dim=16, depth=1, segment_len=4)
    before = config.model_dump()
    with pytest.raises(ValueError, match=field):
        setattr(config, field, value)
    assert config.model_dump() == before


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: TitansConfig(variant="mac"), "MAC"),
        (lambda: TitansConfig(variant="MAGG"), "MAG"),
        (lambda: TitansConfig.preset("meduim"), "medium"),
        (lambda: MirasConfig(bias="hubber"), "huber"),
        (lambda: MirasConfig(retention="anchord"), "anchored"),
        (lambda: build_model(TitansConfig(**MODEL), engine="fusd"), "fused"),
        (lambda: load_documents("enwik9"), "enwik8"),
        (lambda: load_documents("stdlib", "trian"), "train"),
    ],
)
def test_a_name_that_nobody_knows_brings_the_nearest_to_mind(call, meant):
    with pytest.raises((ValueError, FileNotFoundError), match=f"did you mean '{meant}'"):
        call()


def test_two_functions_of_one_name_are_two_rules():
    biases = [lambda r, scale=scale: scale * r for scale in (1, 2)] + [lambda r: r**3, lambda r: r**5]

    def times(factor):
        return lambda r: factor * r

    models = [
        build_model(TitansConfig(**MODEL, miras=MirasConfig(bias=bias))) for bias in [*biases, times(1.0), times(2.0)]
    ]
    assert len({model.fingerprint for model in models}) == len(models)
    again = build_model(TitansConfig(**MODEL, miras=MirasConfig(bias=biases[0])))
    assert again.fingerprint == models[0].fingerprint


def test_two_kinds_of_state_cannot_share_a_name():
    class Own(State):
        pass

    with pytest.raises(TypeError, match="the state 'Own' of .* has this name"):
        type("Own", (State,), {"__module__": "elsewhere"})


def test_the_drop_in_refuses_what_it_would_misread():
    model = MACTransformer(config=TransformerConfig(num_tokens=256, dim=16, depth=1, segment_len=4))
    for temperature in (-1e-3, NAN):
        with pytest.raises(ValueError, match="temperature must be"):
            model.sample(IDS, 12, temperature=temperature, filter_fn=lambda logits: logits)
    _, state = model(IDS.expand(2, -1), return_state=True)
    with pytest.raises(ValueError, match="rows of cache must stand at one place"):
        model(IDS.expand(2, -1).repeat(1, 2), cache=state.reset([0]))
