"""Would the tests notice? Changes lines of ops/ and layers/ at random and, for each, runs the tests that cover it.

In a copy of the checkout. Every mutation and what became of it is a line in the output, so that a run that was stopped
goes on. A mutation that survives is either equivalent (say so beside it) or a test that is missing.

    python scripts/mutate.py --number 40 --seed 0 --output runs/mutations.jsonl
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Which tests cover a file, by the longest beginning of its path that is here; the likeliest to notice come first.
TESTS = {
    "": "models/test_models.py models/test_states.py",
    "ops/attention": "ops/test_attention.py models/test_models.py",
    "ops/grid": "models/test_packed.py ops/test_memory_scan.py models/test_models.py",
    "ops/place": "ops/test_decode.py models/test_decoding.py",
    "ops/rows": "models/test_packed.py ops/test_memory_scan.py models/test_streaming_properties.py",
    "ops/scan": "ops/test_scan.py ops/test_memory_scan.py",
    "ops/memory": "ops/test_memory_scan.py miras/test_equations.py memory models/test_states.py models/test_models.py",
    "ops/memory/channel": "ops/test_memory_scan.py models/test_streaming_properties.py models/test_rules.py",
    "ops/memory/chunk_rule": "ops/test_chunk_engines.py ops/test_fused.py ops/test_native.py miras/test_equations.py",
    "ops/memory/decode": "ops/test_decode.py models/test_decoding.py",
    "ops/memory/fused": "ops/test_chunk_engines.py ops/test_fused.py",
    "ops/memory/native": "ops/test_chunk_engines.py ops/test_native.py",
    "ops/memory/native/build": "ops/test_native.py",
    "ops/memory/native/step": "models/test_decoding.py ops/test_decode.py",
    "ops/memory/native/vectors": "models/test_decoding.py",
    "ops/memory/maps": "ops/test_chunk_engines.py ops/test_fused.py ops/test_native.py ops/test_memory_scan.py",
    "ops/memory/workspace": "ops/test_fused.py ops/test_native.py",
    "layers": "memory models/test_models.py models/test_states.py models/test_streaming_properties.py",
    "layers/decoding": "models/test_decoding.py models/test_models.py",
    "layers/attention": "ops/test_attention.py models/test_models.py models/test_packed.py",
    "layers/convolution": "memory models/test_models.py models/test_packed.py models/test_states.py",
    "layers/module": "test_seeds.py models/test_faces.py models/test_models.py",
    "layers/vectors": "models/test_decoding.py",
}
SWAPS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.MatMult: ("@", "*"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """Characters ``start`` to ``stop`` of a line of a file, and what comes in their place."""

    file: str
    line: int
    start: int
    stop: int
    new: str

    def changed(self, text: str) -> tuple[str, str, str]:
        """The whole text, and the line before and after."""
        lines = text.splitlines(keepends=True)
        before = lines[self.line - 1]
        lines[self.line - 1] = before[: self.start] + self.new + before[self.stop :]
        return "".join(lines), before.strip(), lines[self.line - 1].strip()


def candidates(file: str, text: str) -> Iterator[Mutation]:
    """Every change that we know of in a file: operators, comparisons, signs, numbers; no messages, no annotations."""
    lines = text.splitlines()
    tree = ast.parse(text)
    left_out = {id(n) for node in ast.walk(tree) for part in _words(node) for n in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.BinOp):
            yield from _between(file, lines, node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp):
            yield from _between(file, lines, node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.Compare):
            yield from _between(file, lines, node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            width = 1 if isinstance(node.op, ast.USub) else len("not ")
            yield Mutation(file, node.lineno, node.col_offset, node.col_offset + width, "")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.end_col_offset:
            yield Mutation(file, node.lineno, node.col_offset, node.end_col_offset, repr(node.value + 1))


def _words(node: ast.AST) -> list[ast.AST]:
    """Parts of a node that compute nothing."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.AnnAssign):
        value = getattr(node, "value", None)
        return [n for n in ast.iter_child_nodes(node) if n is not value]
    annotations = [getattr(node, name, None) for name in ("annotation", "returns")]
    return [annotation for annotation in annotations if annotation is not None]


def _between(file: str, lines: list[str], left: ast.expr, right: ast.expr, operator: ast.AST) -> Iterator[Mutation]:
    """The operator between two operands, where both stand on one line."""
    if type(operator) not in SWAPS or left.end_lineno != right.lineno:
        return
    old, new = SWAPS[type(operator)]
    line = lines[right.lineno - 1].encode()
    start = line.find(old.encode(), left.end_col_offset or 0, right.col_offset)
    if start >= 0 and line.isascii():
        yield Mutation(file, right.lineno, start, start + len(old), new)


def draw(number: int, seed: int) -> list[Mutation]:
    """One change each of ``number`` lines, drawn from all lines that can be changed."""
    by_line: dict[tuple[str, int], list[Mutation]] = {}
    for folder in ("ops", "layers"):
        for path in sorted((ROOT / "src/titans" / folder).rglob("*.py")):
            file = path.relative_to(ROOT / "src/titans").as_posix()
            for mutation in candidates(file, path.read_text(encoding="utf-8")):
                by_line.setdefault((file, mutation.line), []).append(mutation)
    source = random.Random(seed)
    return [source.choice(by_line[line]) for line in source.sample(sorted(by_line), min(number, len(by_line)))]


def tests_of(file: str) -> list[str]:
    best = max((start for start in TESTS if file.startswith(start)), key=len)
    return [f"tests/{name}" for name in TESTS[best].split()]


def run(mutation: Mutation, copy: Path, limit: float) -> dict[str, object]:
    """Change the copy, run the tests, change it back."""
    path = copy / "src/titans" / mutation.file
    text = path.read_text(encoding="utf-8")
    changed, before, after = mutation.changed(text)
    path.write_text(changed, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [*command, *tests_of(mutation.file)],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
        told = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        caught, by = done.returncode != 0, told[0][:160] if told else f"exit {done.returncode}"
    except subprocess.TimeoutExpired:
        caught, by = True, f"no end after {limit:.0f} s"
    finally:
        path.write_text(text, encoding="utf-8")
    where = {"file": mutation.file, "line": mutation.line, "before": before, "after": after}
    return {**where, "caught": caught, "by": by if caught else None}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=40, help="lines to change")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of lines")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which tests count as failed")
    parser.add_argument("--output", type=Path, default=Path("runs/mutations.jsonl"))
    given = parser.parse_args(arguments)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in given.output.read_text().splitlines()] if given.output.exists() else []
    known = {(one["file"], one["line"], one["after"]) for one in done}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        left_out = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".hypothesis")
        shutil.copytree(ROOT, copy, ignore=left_out)
        for number, mutation in enumerate(draw(given.number, given.seed), start=1):
            _, _, after = mutation.changed((ROOT / "src/titans" / mutation.file).read_text(encoding="utf-8"))
            if (mutation.file, mutation.line, after) in known:
                continue
            told = run(mutation, copy, given.limit)
            done.append(told)
            with given.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
            what = "caught" if told["caught"] else "SURVIVED"
            print(f"{number}: {what}: {told['file']}:{told['line']}: {told['before']} -> {told['after']}", flush=True)
    survived = [one for one in done if not one["caught"]]
    print(f"{len(done) - len(survived)} of {len(done)} caught")
    return int(len(survived) > len(done) // 20)


if __name__ == "__main__":
    sys.exit(main())
