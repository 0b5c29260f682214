"""Every file and name of ours that the docs, docstrings and comments mention is there."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDERS = ("tucka_runtime", "kernels", "server", "loadtest", "tests", "deploy")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not {".venv", "golden", ".git"} & set(path.relative_to(ROOT).parts)
)

# A path with a folder in it, or the name of one of our sources.
FILE = re.compile(
    r"(?<![\w/.<{*-])((?:[\w.-]+/)+[\w.-]+\.(?:py|md|cpp|sh|yml|yaml|json|html|png|toml)|\w+\.(?:py|cpp|md))\b"
)
NAME = re.compile(r"(?<![\w./:-])([a-z_]+)\.([A-Za-z_]\w*)\b(?!\.\w)(?![(/])")
MODULES = {path.stem: path for path in SOURCES}
# Words that are modules of ours and of somebody else's, or plain nouns before a file's suffix.
NOT_OURS = {
    "torch",
    "json",
    "client",
    "config",
    "settings",
    "top",
    "page",
    "model",
    "table",
    "adapter",
    "report",
    "data",
    "base",
}
SUFFIXES = {"py", "md", "json", "safetensors", "yaml", "yml", "png", "html", "cpp", "txt", "toml", "jsonl", "sh", "pt"}


def texts(path: Path) -> Iterator[str]:
    """The docstrings and comments of a source."""
    text = path.read_text("utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def names(path: Path) -> set[str]:
    """What a module defines: at its top, in its classes, and as attributes of its instances."""
    found = {path.stem}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def is_there(file: str, near: Path) -> bool:
    places = (
        ROOT,
        near.parent,
        *(ROOT / folder for folder in FOLDERS),
        ROOT / "docs",
        ROOT / "tucka_runtime" / "engine",
    )
    if any((place / file).exists() for place in places):
        return True
    return "/" not in file and any(path.name == file for path in (*SOURCES, *PAGES))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_page_mentions(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    quoted = " ".join(
        re.findall(r"`([^`\n]+)`|\]\(([^)#\s]+)", text)
        and [a or b for a, b in re.findall(r"`([^`\n]+)`|\]\(([^)#\s]+)", text)]
    )
    missing = {
        file for file in FILE.findall(quoted) if not file.startswith(("http", "DIR/")) and not is_there(file, path)
    }
    assert missing == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_name_that_a_source_mentions(path: Path) -> None:
    for text in texts(path):
        for file in FILE.findall(text):
            assert is_there(file, path), file
        for module, name in NAME.findall(text):
            if module in MODULES and module not in NOT_OURS and name not in SUFFIXES:
                owners = [other for other in SOURCES if other.stem == module]
                assert any(name in names(other) for other in owners), f"{module}.{name}"
