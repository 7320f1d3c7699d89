"""Corpora that hold more than plain files in plain folders: nothing is left out, nothing goes round for ever."""

import os

import pytest

from titans.data import load_documents
from titans.data.corpora import RUN_MARK
from titans.data.streams import TextInput
from titans.evaluation.running_text import stamps
from titans.evaluation.task import EvaluationError


def corpus(folder, **texts):
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def read(folder):
    return sorted(load_documents(folder, "train") + load_documents(folder, "validation"))


def test_linked_folders_and_files_are_read(tmp_path):
    source = corpus(tmp_path / "d", a="one", b="two")
    more = corpus(tmp_path / "more", c="three")
    corpus(more / "deeper", d="four")
    (source / "linked").symlink_to(more)
    (tmp_path / "e.txt").write_text("five")
    (source / "e.txt").symlink_to(tmp_path / "e.txt")
    assert read(source) == sorted(["one", "two", "three", "four", "five"])


def test_suffixes_in_capitals_count(tmp_path):
    source = corpus(tmp_path / "d", a="one", b="two")
    (source / "C.TXT").write_text("three")
    (source / "D.JSONL").write_text('{"text": "four"}\n')
    assert read(source) == sorted(["one", "two", "three", "four"])
    documents = ["".join(pieces) for pieces in TextInput(str(source / "D.JSONL")).documents()]
    assert documents == ["four"]


def test_what_is_no_file_is_named(tmp_path):
    source = corpus(tmp_path / "d", a="one", b="two")
    (source / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"source: .*gone\.txt is a link to nothing"):
        load_documents(source)
    (source / "gone.txt").unlink()
    os.mkfifo(source / "pipe.txt")
    with pytest.raises(ValueError, match=r"source: .*pipe\.txt is no regular file"):
        load_documents(source)


@pytest.mark.parametrize("target", ["..", ".", "../../other"])
def test_links_in_a_circle_are_named(tmp_path, target):
    source = corpus(tmp_path / "d", a="one")
    corpus(tmp_path / "other", b="two")
    (tmp_path / "other" / "back").symlink_to(source)
    (source / "inside").mkdir()
    (source / "inside" / "link").symlink_to(target)
    with pytest.raises(ValueError, match="is a link to a folder that it lies in"):
        load_documents(source)


def test_a_change_behind_a_linked_folder_is_noticed(tmp_path):
    source = corpus(tmp_path / "d", a="The first text says something. " * 9)
    more = corpus(tmp_path / "more", c="Another text says more. " * 9)
    (source / "linked").symlink_to(more)
    before = stamps(str(source))
    (more / "c.txt").write_text("Another text says something else by now.")
    assert stamps(str(source)) != before
    (more / "back").symlink_to(source)
    with pytest.raises(EvaluationError, match="text: source: .* is a link to a folder that it lies in"):
        stamps(str(source))


def test_a_run_s_folder_is_known_behind_a_byte_order_mark(tmp_path):
    source = corpus(tmp_path / "d", a="one", b="two")
    corpus(source / "run", c="three")
    (source / "run" / "config.yaml").write_text(f"\ufeff{RUN_MARK}1234 5678\nmodel: {{}}\n", encoding="utf-8")
    assert read(source) == ["one", "two"]


def test_nobody_s_home_is_a_name_like_any_other():
    with pytest.raises(FileNotFoundError, match="source: '~nobody-of-that-name/x' is neither"):
        load_documents("~nobody-of-that-name/x")


def test_a_text_given_twice_in_a_row_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two", "text": "three"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is not JSON: 'text' is given twice"):
        load_documents(tmp_path / "rows.jsonl")
