"""The default corpus, local files and their splits."""

import json
import os

import pytest

from titans.data import load_documents


def test_standard_library_is_split_by_file():
    train, validation = load_documents("stdlib", "train"), load_documents("stdlib", "validation")
    assert not set(train) & set(validation)
    assert len(train) > 400
    assert 0.05 < sum(map(len, validation)) / sum(map(len, train + validation)) < 0.10
    # Known modules on known sides: the split is part of every published figure and must not move.
    assert any(text.startswith('"""functools.py - Tools') for text in validation)
    assert any(text.startswith('"""Random variable generators') for text in train)
    assert load_documents() == train


def test_standard_library_holds_no_tests_or_add_ons(tmp_path, monkeypatch):
    names = ["json/__init__.py", "test/test_json.py", "idlelib/idle_test/test_x.py", "site-packages/x.py"]
    names += ["config-3.11-x86_64-linux-gnu/python-config.py", "_sysconfigdata__linux_.py", "json/empty.py"]
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("" if "empty" in name else f"# {name}")
    monkeypatch.setattr("titans.data.corpora.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert load_documents("stdlib", "train") == ["# json/__init__.py"]
    with pytest.raises(ValueError, match="split: stdlib has no 'validation' split"):
        load_documents("stdlib", "validation")
    monkeypatch.setattr("titans.data.corpora.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "test")})
    (tmp_path / "test" / "test_json.py").unlink()
    with pytest.raises(FileNotFoundError, match="source: Python's standard library has no .py files"):
        load_documents("stdlib", "train")


def test_single_text_keeps_its_last_part_for_validation(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    train, validation = (load_documents(tmp_path / "book.txt", split) for split in ("train", "validation"))
    assert train == [text[:950]]
    assert validation == [text[950:]]


def write_jsonl(path, texts, field="text"):
    path.write_text("\n".join(json.dumps({field: text}) for text in texts) + "\n\n")


def write_parquet(path, texts, field="text"):
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table({field: list(texts), "n": list(range(len(texts)))}), path)


@pytest.mark.parametrize(("suffix", "write"), [("jsonl", write_jsonl), ("parquet", write_parquet)])
def test_rows_are_documents_split_by_hash(tmp_path, suffix, write):
    texts = [f"document {i} é" for i in range(100)] + ["said twice"] * 2 + [""]
    path = tmp_path / f"rows.{suffix}"
    write(path, texts, field="body")
    train, validation = (load_documents(path, split, text_field="body") for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(filter(None, texts))
    assert not set(train) & set(validation)
    assert 5 <= len(validation) <= 6
    write(path, texts[::-1], field="body")
    assert set(load_documents(path, "validation", text_field="body")) == set(validation)


RAW = "a\r\nb\rc\0\u2028d\x85e\n"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_texts_are_read_as_they_stand(tmp_path, mark):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_bytes(mark + RAW.encode())
        row = json.dumps({"text": "\ufeff" + RAW}, ensure_ascii=False).encode()
        (tmp_path / f"{name}.jsonl").write_bytes(mark + row + b"\r\n\r\n" + row)
        write_parquet(tmp_path / f"{name}.parquet", [RAW])
    # A byte order mark inside a row is the row's; one at the beginning of a file is none of the text.
    assert load_documents(tmp_path, "train") == ["\ufeff" + RAW] * 2 + [RAW] * 2


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_text_that_is_not_utf8_is_refused_with_the_byte(tmp_path, mark):
    rows = mark + b'{"text": "one"}\n\n' + b'{"text": "'
    for name, good in (("a.txt", mark + b"caf"), ("a.jsonl", rows)):
        for bad in (b"\xe9 au lait", b"\xe9"):
            (tmp_path / name).write_bytes(good + bad)
            with pytest.raises(ValueError, match=f"source: .*{name}: not UTF-8 at byte {len(good)};"):
                load_documents(tmp_path)
        (tmp_path / name).unlink()


def test_a_row_of_a_table_that_is_not_utf8_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    broken = pyarrow.array([b"one", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"source: .*a.parquet, row 2: not UTF-8 at byte 3;.* of the row's text"):
        load_documents(tmp_path)


def test_the_corpora_with_names_may_hold_bytes_that_are_no_text(tmp_path, monkeypatch):
    (tmp_path / "enwik8").write_bytes(b"x\xff" + b"y" * 98)
    monkeypatch.setattr("titans.data.published.ENWIK8_BYTES", 100)
    assert load_documents("enwik8", data_dir=tmp_path)[0].startswith("x\ufffdy")


def test_folder_pools_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("first")
    (tmp_path / "deep" / "a.txt").write_text("second")
    write_jsonl(tmp_path / "c.jsonl", ["third", "fourth"])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    train, validation = (load_documents(tmp_path, split) for split in ("train", "validation"))
    assert len(validation) == 1
    assert sorted(train + validation) == ["first", "fourth", "second", "third"]


@pytest.mark.parametrize(
    "validation_name", ["valid.txt", "wiki.validation.txt", "val/part.txt", "validation-00000.txt"]
)
def test_folder_with_its_own_splits(tmp_path, validation_name):
    (tmp_path / "train-a.txt").write_text("one")
    (tmp_path / "train-b.txt").write_text("two")
    (tmp_path / validation_name).parent.mkdir(exist_ok=True)
    (tmp_path / validation_name).write_text("three")
    assert load_documents(tmp_path, "train") == ["one", "two"]
    assert load_documents(tmp_path, "validation") == ["three"]
    with pytest.raises(ValueError, match="no 'test' split"):
        load_documents(tmp_path, "test")
    (tmp_path / "test.txt").write_text("four")
    assert load_documents(tmp_path, "test") == ["four"]
    (tmp_path / "notes.txt").write_text("neither")
    with pytest.raises(ValueError, match="source: .*notes.txt names no split"):
        load_documents(tmp_path, "train")


def test_errors_name_the_field(tmp_path):
    with pytest.raises(ValueError, match="split: 'dev'"):
        load_documents("stdlib", "dev")
    with pytest.raises(FileNotFoundError, match="source: 'nowhere'"):
        load_documents("nowhere", "train")
    with pytest.raises(ValueError, match=r"source: folder .* holds no .txt, .jsonl, .parquet file"):
        load_documents(tmp_path, "train")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="source: .* holds no text"):
        load_documents(tmp_path, "train")
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"source: .*data.csv is none of"):
        load_documents(tmp_path / "data.csv", "train")
    (tmp_path / "same.jsonl").write_text('{"text": "same"}\n' * 3)
    with pytest.raises(ValueError, match="too uniform to give a train split"):
        load_documents(tmp_path / "same.jsonl", "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text"', "source: .*line 2 is not JSON"),
        ('{"body": "a"}', "text_field: .*line 1 has no text under 'text'"),
        ("[1]", "text_field: .*line 1"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_documents(tmp_path / "rows.jsonl", "train")


def test_bad_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, ["a", "b"])
    with pytest.raises(ValueError, match="no column 'body', only text, n"):
        load_documents(path, "train", text_field="body")
    with pytest.raises(ValueError, match="text_field: column 'n' of .* is not text"):
        load_documents(path, "train", text_field="n")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="source: .* is not a readable .parquet file"):
        load_documents(path, "train")


def test_a_folder_that_cannot_be_read_is_an_error_not_a_smaller_corpus(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(name * 100)
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="denied"):
        load_documents(tmp_path)


def test_folders_of_runs_are_left_out(tmp_path):
    (tmp_path / "text.txt").write_text("words " * 50)
    run = tmp_path / "runs" / "a" / "deeper"
    run.mkdir(parents=True)
    (run.parent / "config.yaml").write_text("# titans run 0123 4567\ndata: {}\n")
    (run.parent / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "text.txt").write_text("output")
    assert "output" not in "".join(load_documents(tmp_path) + load_documents(tmp_path, "validation"))


def test_home_and_nothing(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("words " * 50)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_documents("~/text.txt") == load_documents(tmp_path / "text.txt")
    with pytest.raises(ValueError, match="source: is empty"):
        load_documents("")
