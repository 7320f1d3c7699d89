"""The Python of README.md, docs/state.md and docs/memory_files.md runs as printed, each block on its own."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(code, id=f"{name}-{number}")
    for name in ("README.md", "docs/state.md", "docs/memory_files.md")
    for number, code in enumerate(BLOCK.findall((ROOT / name).read_text(encoding="utf-8")))
]


def test_there_are_blocks():
    assert len(BLOCKS) > 1


@pytest.mark.parametrize("code", BLOCKS)
def test_block(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})
