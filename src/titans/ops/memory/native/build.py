"""Compiles the C++ scan once and keeps it: a plain shared library without Python or torch headers, seconds to build."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = (
    "scan.cpp", "around.h", "backward.h", "forward.h", "attend.h", "step.h", "vectors.h", "scratch.h", "row.h",
    "kernels.h",
)  # fmt: skip
# Not -ffast-math: it would make the whole process flush denormal numbers to zero.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
         "-fassociative-math", "-freciprocal-math", "-fopenmp", "-fPIC", "-shared")  # fmt: skip
TIMEOUT = 300  # seconds


def available() -> bool:
    """Can the native engine be used here? Compiles it if that was never done; False without a compiler."""
    return unavailable() is None


def unavailable() -> str | None:
    """Why the native engine cannot be used here, in a sentence; None where it can."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The compiled scan.

    Raises:
        RuntimeError: it cannot be had, with the reason.
    """
    found, reason = _load()
    if found is None:
        raise RuntimeError(f"the native engine is not available: {reason}")
    return found


def cache_folder() -> Path:
    """Where compiled libraries are kept: $TITANS_CACHE, or ~/.cache/titans."""
    return Path(os.environ.get("TITANS_CACHE") or Path.home() / ".cache" / "titans")


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler was found (g++, clang++ or $CXX)"
    try:
        return _declare(ctypes.CDLL(str(_build(compiler)))), None
    except subprocess.CalledProcessError as error:
        errors = [line for line in error.stderr.splitlines() if "error" in line or "undefined" in line]
        return None, f"{compiler} failed: {(errors or [error.stderr.strip()])[0][:300]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home folder
        return None, f"{type(error).__name__}: {error}"


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def _build(compiler: str) -> Path:
    """The library's path, compiled now unless it is there."""
    libraries = Path(torch.__file__).parent / "lib"
    command = [compiler, *FLAGS]
    if platform.machine() in ("x86_64", "AMD64"):
        command.append("-mprefer-vector-width=512")
    links = [f"-L{libraries}", "-ltorch_cpu", f"-Wl,-rpath,{libraries}", "-Wl,--no-undefined"]
    target = cache_folder() / f"scan-{_key(command)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "scan.so"
        command += [str(HERE / "scan.cpp"), "-o", str(made), *links]
        _run(command)
        made.replace(target)  # in one step: another process may be doing the same
    return target


def _run(command: list[str]) -> str:
    """What a command says, in whatever language and encoding."""
    done = subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT, encoding="utf-8", errors="replace")
    return done.stdout


def _key(command: list[str]) -> str:
    """Of all that the binary depends on: sources, flags, compiler, torch, and the processor's instructions."""
    told = [
        *command,
        _run([command[0], "--version"]),
        torch.__version__,
        str(Path(torch.__file__).parent),
        _processor(),
    ]
    told += [(HERE / name).read_text(encoding="utf-8") for name in SOURCES]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:24]


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.exists() else []
    known = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(known))) or f"{platform.machine()} {platform.processor()}"


def _declare(found: ctypes.CDLL) -> ctypes.CDLL:
    sizes, numbers = ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_double)
    pointers = ctypes.POINTER(ctypes.c_void_p)
    found.titans_scan.argtypes = [sizes, pointers, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    found.titans_scan.restype = ctypes.c_int
    found.titans_step.argtypes = [sizes, numbers, pointers, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    found.titans_attend.argtypes = [sizes, pointers, ctypes.c_int, ctypes.c_int]
    found.titans_vectors.argtypes = [sizes, ctypes.c_double, pointers, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    found.titans_around.argtypes = [sizes, ctypes.c_double, pointers, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    found.titans_around.restype = None
    for function in (found.titans_step, found.titans_attend, found.titans_vectors):
        function.restype = ctypes.c_int
    found.titans_scan_acts.argtypes = [sizes]
    found.titans_scan_acts.restype = ctypes.c_int64
    return found
