"""README and docs: valid links, existing files, and a short README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import document_configuration

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 700


def headings(document: Path) -> set[str]:
    """The anchors that GitHub makes from the headings of a document."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_point_to_existing_files_and_headings(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_a_document_exist(document):
    text = document.read_text(encoding="utf-8")
    examples = re.findall(r"^```\w+ file=(\S+)", text, re.MULTILINE)
    for name in re.findall(
        r"(?<![\w/])((?:src|rules|config|benchmarks|tests|envs)/[a-z0-9_/]+\.[a-z]+)", text
    ):
        assert (ROOT / name).exists() or name in examples, name


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_page_of_all_keys_is_up_to_date(program):
    program(document_configuration, "--check")
