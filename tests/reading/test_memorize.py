"""A reading that is killed, resumed or appended to gives the file of one that was not; what cannot be is named."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tiny import tensors
from titans.models import MemoryFile, load_memory
from titans.models.memory_file import changes
from titans.reading import Job, memorize, memorize_files

fork = multiprocessing.get_context("fork")


def same(one, two):
    """The same bits of all tensors and words; safetensors writes the words in any order."""
    hashes = []
    for path in (one, two):
        with safe_open(path, "pt") as file:
            hashes.append(file.metadata()["hash"])
    return hashes[0] == hashes[1]


def test_a_file_is_its_documents_one_after_the_other(model, tokenizer, files, tmp_path):
    told = []
    file = memorize_files(model, tokenizer, Job(tuple(files), tmp_path / "m"), told.append)
    texts = [Path(files[0]).read_text(), *_rows(files[1]), Path(files[2]).read_text()]
    ids = torch.tensor([i for text in texts for i in (0, *text.encode())])
    whole = model(ids[None]).state
    loaded = load_memory(tmp_path / "m", model)
    assert loaded.seen == whole.seen == (len(ids),) == (file.tokens,)
    for one, two in zip(tensors(loaded), tensors(whole), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert [item.name for item in file.inputs] == ["a.txt", "b.jsonl", "c.txt"]
    for item, path in zip(file.inputs, files):
        content = Path(path).read_bytes()
        assert (item.bytes, item.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert sum(item.tokens for item in file.inputs) == len(ids)
    assert file.layers == tuple(changes(model, file.state, file.forgotten)) and file.layers[0].moved > 0
    assert not any(word in (tmp_path / "m").read_bytes() for word in (b"quick", b"lazy", str(tmp_path).encode()))
    assert told[-1].tokens == len(ids) and told[-1].left == 0 and told[0].left > 0


def _rows(path):
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def test_append_gives_the_bits_of_all_at_once(model, tokenizer, files, tmp_path):
    memorize_files(model, tokenizer, Job(tuple(files), tmp_path / "whole"))
    memorize_files(model, tokenizer, Job((files[0],), tmp_path / "first"))
    memorize_files(model, tokenizer, Job(tuple(files[1:]), tmp_path / "both", append=tmp_path / "first"))
    assert same(tmp_path / "whole", tmp_path / "both")


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("append", [False, True])
def test_stopped_after_any_piece_and_resumed(model, tokenizer, files, tmp_path, monkeypatch, append):
    before = None
    if append:
        before = tmp_path / "before"
        memorize_files(model, tokenizer, Job((files[2],), before))
    memorize_files(model, tokenizer, Job(tuple(files), tmp_path / "whole", before))
    job = Job(tuple(files), tmp_path / "cut", before, resume=True, save_every=0)
    read, rounds = memorize.read_piece, 0

    def stop(left):
        def read_piece(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return read(*arguments)

        return read_piece

    for pieces in (0, 1, 2, 1, 7, 3, 1, 1, 99):
        monkeypatch.setattr(memorize, "read_piece", stop(pieces))
        rounds += 1
        try:
            file = memorize_files(model, tokenizer, job)
        except Killed:
            if job.output.exists():
                with pytest.raises(ValueError, match="half-read"):
                    load_memory(job.output, model)
            continue
        break
    assert rounds == 9 and file.tokens
    assert same(tmp_path / "whole", job.output)
    assert memorize_files(model, tokenizer, job).tokens == file.tokens  # there is nothing left to do
    assert same(tmp_path / "whole", job.output)


def _work(model, tokenizer, job):
    torch.set_num_threads(1)
    memorize_files(model, tokenizer, job)


def _kill_until(model, tokenizer, files, tmp_path, kills):
    """SIGKILL at random moments until there were so many; every file that comes of it is the whole one."""
    started = time.perf_counter()
    memorize_files(model, tokenizer, Job(tuple(files), tmp_path / "whole", save_every=0))
    length = time.perf_counter() - started
    draw, killed, rounds = random.Random(0), 0, 0
    job = Job(tuple(files), tmp_path / "cut", resume=True, save_every=0)
    while killed < kills:
        rounds += 1
        assert rounds < 10 * kills
        process = fork.Process(target=_work, args=(model, tokenizer, job))
        process.start()
        process.join(draw.uniform(0.05, 0.6) * length)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert same(tmp_path / "whole", job.output)
            job.output.unlink()
    memorize_files(model, tokenizer, job)
    assert same(tmp_path / "whole", job.output)


def test_three_kills(model, tokenizer, files, tmp_path):
    _kill_until(model, tokenizer, files, tmp_path, 3)


@pytest.mark.slow
def test_twenty_kills(model, tokenizer, files, tmp_path):
    _kill_until(model, tokenizer, [*files, files[0], files[1], files[2]], tmp_path, 20)


def test_sizes_of_reads_and_dtypes_of_the_end_change_nothing_else(model, tokenizer, files, tmp_path):
    memorize_files(model, tokenizer, Job((files[0],), tmp_path / "float32"))
    memorize_files(model, tokenizer, Job((files[0],), tmp_path / "int8", dtype="int8", save_every=0))
    exact, rounded = MemoryFile.open(tmp_path / "float32"), MemoryFile.open(tmp_path / "int8")
    assert (exact.stored, rounded.stored) == ("float32", "int8")
    assert (exact.layers, exact.inputs) == (rounded.layers, rounded.inputs)  # told before rounding


def test_what_cannot_be_resumed_or_appended_is_named(model, tokenizer, files, tmp_path, monkeypatch):
    def refused(message, *words, **settings):
        with pytest.raises(ValueError, match=message):
            memorize_files(model, tokenizer, Job(*words, **settings))

    output = tmp_path / "m"
    read = memorize.read_piece
    monkeypatch.setattr(memorize, "read_piece", _twice(read))
    with pytest.raises(Killed):
        memorize_files(model, tokenizer, Job((files[0], files[2]), output))
    monkeypatch.setattr(memorize, "read_piece", read)
    half = output.read_bytes()
    refused("m exists; go on with --resume", (files[0],), output)
    refused("was reading a.txt, c.txt", (files[0],), output, resume=True)
    refused("--append: .*did not start from that", (files[0], files[2]), output, Path(files[1]), resume=True)
    refused("m.* is half-read", (files[1],), tmp_path / "n", output)
    text = Path(files[0]).read_text()
    Path(files[0]).write_text(text.replace("quick", "slick"))
    refused("a.txt has changed since its first 128 tokens", (files[0], files[2]), output, resume=True)
    Path(files[0]).write_text(text[:50])
    refused("a.txt has changed since its first 128 tokens", (files[0], files[2]), output, resume=True)
    assert output.read_bytes() == half
    refused("standard input can be read once", ("-", "-"), tmp_path / "n")
    refused("names no input", (), tmp_path / "n")
    refused("is a folder", (files[1],), tmp_path)
    refused("cannot write into", (files[1],), Path(files[0]) / "m")
    refused("is what --append reads", (files[1],), output, output)
    (tmp_path / "empty.txt").write_text("")
    refused("empty.txt holds no text", (str(tmp_path / "empty.txt"),), tmp_path / "n")
    assert not (tmp_path / "n").exists()
    memorize_files(model, tokenizer, Job((files[1],), tmp_path / "n"))
    refused("is a finished memory of b.jsonl", (files[2],), tmp_path / "n", resume=True)


def _twice(read):
    calls = []

    def read_piece(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise Killed
        return read(*arguments)

    return read_piece


def test_a_file_that_changes_between_inputs_is_noticed(model, tokenizer, files, tmp_path, monkeypatch):
    calls = []
    read = memorize.read_piece

    def read_piece(model, ids, state):
        calls.append(len(ids))
        if np.sum(calls) > 430:  # the first input is over
            raise Killed
        return read(model, ids, state)

    monkeypatch.setattr(memorize, "read_piece", read_piece)
    job = Job((files[0], files[2]), tmp_path / "m", resume=True)
    with pytest.raises(Killed):
        memorize_files(model, tokenizer, job)
    assert [item.name for item in MemoryFile.open(job.output).inputs] == ["a.txt"]
    monkeypatch.setattr(memorize, "read_piece", read)
    Path(files[0]).write_text("another text")
    with pytest.raises(ValueError, match="a.txt has changed since it was read"):
        memorize_files(model, tokenizer, job)


def test_a_file_that_somebody_wrote_meanwhile_stays(model, tokenizer, files, tmp_path, monkeypatch):
    """Two readings with one output: the second to write says so, instead of replacing the first one's file."""
    output, read = tmp_path / "m", memorize.read_piece

    def meanwhile(*words):
        output.write_text("theirs")
        return read(*words)

    monkeypatch.setattr(memorize, "read_piece", meanwhile)
    with pytest.raises(ValueError, match="m was written by another process meanwhile"):
        memorize_files(model, tokenizer, Job((files[0],), output))
    assert output.read_text() == "theirs"
