"""Pieces of a page."""

from collections.abc import Iterable, Sequence
from html import escape

from tucka_runtime.loadtest.report.style import CSS


def document(title: str, body: str) -> str:
    """A whole page that needs nothing outside itself."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{CSS}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body><main>{body}</main></body></html>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    cells = "".join(f"<th>{c}</th>" for c in head)
    lines = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells}</tr>{lines}</table></div>'


def card(title: str, content: str) -> str:
    return f'<div class="card"><h3>{title}</h3>{content}</div>'


def keys(names: dict[str, str]) -> str:
    spans = (f'<span class="key" style="background:var(--{c})"></span>{escape(n)}' for n, c in names.items())
    return f'<span class="soft small">{"".join(spans)}</span>'
