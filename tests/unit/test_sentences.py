# SPDX-License-Identifier: MIT
"""Sentences of documents, comments and docstrings are short."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_WORDS = 20
WORD = re.compile(r"[\w`'./()@*+-]*\w[\w`'./()@*+-]*")
FIELDS = re.compile(r"(?:`[^`]+`(?: \([^()]*\))?(?:, and |, | and | or )?)+")
"""A list of names is one thing to a reader, what stands in brackets behind one included."""


def written() -> list[str]:
    """The files that have sentences: documents, C and Python."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "*.md", "*.c", "*.h", "*.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in done.stdout.split() if (ROOT / name).exists()]


def sentences(text: str) -> Iterator[str]:
    """Sentences of paragraphs and list items; without tables, headings and what is set apart."""
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        table = line.startswith(("|", "#", "!", "<")) or re.search(r"\w {2,}\w", line)
        apart = table or not line.strip() or line.startswith(("    ", "\t"))
        item = re.match(r"\s*(?:[-*]|\d+\.|@\w+:|:\w+)\s", line)
        if apart or item:
            yield from re.split(r"(?<=[.!?:;])\)?\s+", " ".join(paragraph))
            paragraph = []
        if not apart:
            paragraph.append(line[item.end() :].strip() if item else line.strip())


def comments_of_python(source: str) -> Iterator[str]:
    """Docstrings, and comments: those on lines of their own as a block, others one by one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("#").strip()
        if token.line[: token.start[1]].strip():
            yield text
            continue
        if token.start[0] != last + 1:
            yield "\n".join(block)
            block = []
        block.append(text)
        last = token.start[0]
    yield "\n".join(block)


def comments_of_c(source: str) -> Iterator[str]:
    for comment in re.findall(r"/\*+(.*?)\*/", source, re.DOTALL):
        yield "\n".join(re.sub(r"^\s*\*? ?", "", line) for line in comment.splitlines())


def texts(name: str) -> Iterator[str]:
    source = (ROOT / name).read_text()
    if name.endswith(".py"):
        yield from comments_of_python(source)
    elif name.endswith(".md"):
        yield source
    else:
        yield from comments_of_c(source)


def words(sentence: str) -> int:
    return len(WORD.findall(FIELDS.sub("names ", sentence)))


@pytest.mark.parametrize("place", ["documents", "bench", "bpf", "kmod", "python", "tests", "other"])
def test_a_sentence_has_few_words(place: str) -> None:
    long = {
        (name, one): words(one)
        for name in written()
        if place_of(name) == place
        for text in texts(name)
        for one in sentences(text)
        if words(one) > MOST_WORDS
    }
    assert long == {}


def place_of(name: str) -> str:
    """The documents, a folder with code, or what lies elsewhere."""
    folder = name.partition("/")[0]
    if name.endswith(".md"):
        return "documents"
    return folder if folder in ("bench", "bpf", "kmod", "python", "tests") else "other"


def test_long_sentences_are_found_where_they_stand() -> None:
    """In a paragraph, a comment over two lines, a docstring; a list of fields is one word."""
    long = " ".join(["word"] * (MOST_WORDS + 1))
    assert [words(one) for one in sentences(f"Short one.\n{long[:50]}\n{long[50:]}")][1] > 20
    found = [*comments_of_python(f'"""Doc.\n\n{long}."""\nx = 1  # a\ny = 2  # b\n# c\n# d\n')]
    assert found == [f"Doc.\n\n{long}.", "a", "b", "", "c\nd"]
    assert [*comments_of_c("/* one\n * two */ int x; /* three */")] == ["one\ntwo ", "three "]
    assert words(f"Has {', '.join(['`field`'] * 30)} in it.") == 4
