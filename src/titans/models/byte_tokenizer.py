"""The byte tokenizer as the files that `AutoTokenizer` opens, for folders of models whose tokens are bytes."""

import json
from pathlib import Path

VOCABULARY = 256
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
OLDER = "tokenizer"  # the folder that runs of some time ago left it in
BYTES = "titans_bytes"  # in the settings: the ids are byte values, which `titans.data.ByteTokenizer` makes much faster


def letters() -> list[str]:
    """The letter that stands for each byte in a tokenizer.json: itself if it prints, else one from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(VOCABULARY) if byte not in printed)
    found = {**{byte: chr(byte) for byte in printed}, **{byte: chr(0x100 + n) for n, byte in enumerate(others)}}
    return [found[byte] for byte in range(VOCABULARY)]


def spells_bytes(path: Path) -> bool:
    """Whether a tokenizer.json has the ids that `files` gives it, whoever wrote it since."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return found == {letter: byte for byte, letter in enumerate(letters())}


def files() -> dict[str, str]:
    """Name and content of each file. End, begin and padding are byte 0, which a text cannot spell as such."""
    vocabulary = {letter: byte for byte, letter in enumerate(letters())}
    end = letters()[0]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    backend = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": end, **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
        "padding_side": "left",  # of prompts: what is generated follows the last token
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        BYTES: True,
    }
    found = {TOKENIZER: backend, SETTINGS: settings}
    return {name: json.dumps(told, indent=1, ensure_ascii=False) + "\n" for name, told in found.items()}
