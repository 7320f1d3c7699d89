"""The examples run as they stand and print what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "promised"),
    [
        ("01_quickstart.py", ["Parameters: ", "logits (2, 128, 256)", "generated (1, 58)"]),
        ("02_training_loop.py", ["step 20: loss "]),
        ("04_own_members.py", ["LogCosh(width=0.5)", "'tanh'", "bilinear", "normalised", "y (2, 100, 64)"]),
        ("05_memory_file.py", ["read 4,440 tokens", "int8", "in the batch: True", "then 4,456, still 4,440"]),
        ("03_memory_standalone.py", ["y (2, 100, 64)", "retrieved (2, 5, 64)", "surprise at first sight"]),
    ],
)
def test_example(name, promised):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for text in promised:
        assert text in done.stdout
