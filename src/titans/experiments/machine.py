"""What a result was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch


def made_with() -> dict[str, Any]:
    """Machine, threads, versions, and the commit of the code (None outside a git checkout)."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": accelerator or _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


@cache
def _commit() -> str | None:
    """The commit, with ``+`` when tracked files differ from it."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installation inside somebody else's repository has a commit that is not ours.
        if git("ls-files", "--error-unmatch", Path(__file__).name) == "":
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
