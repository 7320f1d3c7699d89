"""No locale decides what a file says: every text is read and written as UTF-8 by name."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import titans

SOURCES = sorted(Path(titans.__file__).parent.rglob("*.py"))


def left_to_the_locale(call):
    """Does a call read or write text in an encoding that it does not name?"""
    named = {word.arg for word in call.keywords}
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("read_text", "write_text"):  # of a path: the command line's own function takes text alone
        return isinstance(function, ast.Attribute) and "encoding" not in named
    if name == "open" and isinstance(function, ast.Name):
        mode = [a.value for a in call.args[1:2] if isinstance(a, ast.Constant)]
        return "encoding" not in named and not any("b" in str(m) for m in mode)
    return name in ("run", "Popen", "check_output") and bool(named & {"text", "universal_newlines"} - {"encoding"})


def test_every_text_names_its_encoding():
    found = [
        f"{path}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and left_to_the_locale(node)
    ]
    assert not found


def test_the_native_engine_is_had_in_a_plain_ascii_locale():
    command = "from titans.ops.memory.native import build; import sys; print(build._key([sys.executable]))"
    told = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-c", command], env={**os.environ, **told}, capture_output=True, text=True)
    assert run.returncode == 0 and len(run.stdout.strip()) == 24, run.stderr
