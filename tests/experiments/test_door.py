"""The command finds the experiments of a checkout, or says where they are; the scripts use those beside them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ("-m", "titans.cli", "experiment")


@pytest.fixture
def installed(tmp_path):
    """What a wheel leaves: a folder with the package and nothing beside it."""
    folder = tmp_path / "lib" / "python" / "site-packages"
    folder.mkdir(parents=True)
    (folder / "titans").symlink_to(ROOT / "src" / "titans")
    return folder


def python(path, cwd, *words):
    # Safe: the working directory is not on sys.path, as under the command `titans`.
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_an_installed_package_finds_those_of_the_working_directory(installed):
    done = python(installed, ROOT, *COMMAND, "--list")
    assert done.returncode == 0 and "miras-variants " in done.stdout, done.stderr


def test_an_editable_install_finds_those_beside_its_source(tmp_path):
    done = python(ROOT / "src", tmp_path, *COMMAND, "--list")
    assert done.returncode == 0 and "miras-variants " in done.stdout, done.stderr


def test_elsewhere_one_line_says_where_they_are(installed, tmp_path):
    (tmp_path / "experiments").mkdir()  # of that name, but not ours
    done = python(installed, tmp_path, *COMMAND, "--list")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("titans: experiment: the experiments are in the repository")
    assert done.stderr.count("\n") == 1 and "pip install -e" in done.stderr


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("scripts/run_experiments.py", ["none-such"], "'none-such' is none of miras-variants, "),
        ("experiments/01_miras_variants/run_comparison.py", ["--seeds", "1,1"], "--seeds: each seed once, got 1,1"),
    ],
)
def test_the_scripts_are_the_same_command_from_anywhere(script, words, message, installed, tmp_path):
    done = python(installed, tmp_path, ROOT / script, *words)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr
