"""enwik8 and WikiText-103 from small stand-ins on disk; nothing is fetched from the network."""

import zipfile

import pytest

from titans.data import load_documents, published

ARTICLE = " \n = {} = \n \n Text of {} . \n \n = = Section = = \n \n More . \n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "ENWIK8_URL", (tmp_path / "server" / "enwik8.zip").as_uri())
    monkeypatch.setattr(published, "WIKITEXT103_URL", (tmp_path / "server" / "wikitext-103-raw-v1.zip").as_uri())
    monkeypatch.setattr(published, "ENWIK8_BYTES", 1000)
    monkeypatch.delenv("TITANS_DATA", raising=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write_zip(path, members):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_enwik8_is_cut_at_90_and_95_percent(folder, monkeypatch):
    content = b"x" * 899 + "é".encode() + b"y" * 49 + b"z" * 50
    assert len(content) == 1000
    (folder / "enwik8").write_bytes(content)
    monkeypatch.setenv("TITANS_DATA", str(folder))
    parts = [load_documents("enwik8", split) for split in ("train", "validation", "test")]
    # The first cut would halve the é and waits for its end.
    assert parts == [["x" * 899 + "é"], ["y" * 49], ["z" * 50]]


def test_enwik8_from_zip_and_of_the_wrong_size(folder):
    write_zip(folder / "enwik8.zip", {"enwik8": b"a" * 1000})
    assert load_documents("enwik8", "test", data_dir=folder) == ["a" * 50]
    (folder / "enwik8").write_bytes(b"a" * 999)
    with pytest.raises(ValueError, match="source: enwik8 has 999 bytes instead of 1,000"):
        load_documents("enwik8", "test", data_dir=folder)


@pytest.mark.parametrize("form", ["raw", "zip", "words"])
def test_wikitext_articles(folder, form):
    text = "".join(ARTICLE.format(name, name) for name in ("One", "Two = or two"))
    text += ARTICLE.format("Three", "Three")
    name = "wikitext-103/wiki.valid.tokens" if form == "words" else "wikitext-103-raw/wiki.valid.raw"
    if form == "zip":
        write_zip(folder / "wikitext-103-raw-v1.zip", {name: text})
    else:
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    articles = load_documents("wikitext-103", "validation", data_dir=folder)
    # "Two = or two" is no heading by our rule, so it stays with the article before it.
    assert [article.split("=")[1].strip() for article in articles] == ["One", "Three"]
    assert "".join(articles) == text.removeprefix(" \n")


def test_download_is_whole_or_absent(folder, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_documents("enwik8", "train", data_dir=folder)
    message = str(caught.value)
    assert published.ENWIK8_URL in message
    assert str(folder / "enwik8.zip") in message
    assert "\n" not in message
    assert list(folder.iterdir()) == []

    write_zip(tmp_path / "server" / "enwik8.zip", {"enwik8": b"b" * 1000})
    assert load_documents("enwik8", "train", data_dir=folder / "new") == ["b" * 900]
    assert [path.name for path in (folder / "new").iterdir()] == ["enwik8.zip"]


def test_download_cut_short_leaves_nothing(folder, tmp_path, monkeypatch):
    write_zip(tmp_path / "server" / "enwik8.zip", {"enwik8": b"b" * 1000})
    monkeypatch.setattr(published, "copyfileobj", lambda source, target: target.write(source.read(10)))
    with pytest.raises(FileNotFoundError, match="connection closed after 10 of"):
        load_documents("enwik8", "train", data_dir=folder)
    assert list(folder.iterdir()) == []


def test_file_that_is_no_zip(folder):
    (folder / "enwik8.zip").write_text("<html>moved</html>")
    with pytest.raises(ValueError, match=r"source: .*enwik8.zip is not a zip file with enwik8 in it"):
        load_documents("enwik8", "train", data_dir=folder)
