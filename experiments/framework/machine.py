"""What a result was made with."""

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import titans


def made_with() -> dict[str, Any]:
    """Machine, threads, versions, and the commit of the code (None unless all of it is in one git checkout)."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "titans": titans.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


@cache
def _commit() -> str | None:
    """The commit, with ``+`` when tracked files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # The library may come from a wheel or from another checkout: then no commit says what has run.
        git("ls-files", "--error-unmatch", __file__, str(titans.__file__))
        return git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    except (OSError, subprocess.CalledProcessError):
        return None
