"""Every relative link of the committed markdown files leads to a file, and to a heading where it names one."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RAW = ROOT / "docs" / "results" / "raw"  # left out of the source distribution


def pages():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    found = [ROOT / name for name in listed if name]
    return [page for page in found if page.is_file()] or [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")]


def prose(page):
    """The page without code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("](", "] ("), text)


def links(page):
    text = prose(page)
    return re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.MULTILINE)


def anchors(page):
    """Headings as GitHub turns them into anchors."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        found.append(name + (f"-{seen}" if (seen := found.count(name)) else ""))
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    dead = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target.is_relative_to(RAW) and not RAW.exists():
            continue
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead, f"{page.relative_to(ROOT)}: {', '.join(dead)}"


def test_links_and_anchors_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A *b*, `c_d`: é\n[x](one.md) ![y](two.png)\n`[z](no)`\n```\n[z](no)\n# no\n```\n# A b\n# A b\n[r]: c.md\n"
    )
    assert links(page) == ["one.md", "two.png", "c.md"]
    assert anchors(page) == ["a-b-c_d-é", "a-b", "a-b-1"]
