"""/docs over a socket: a page that needs nothing but this server."""

import re
from pathlib import Path

import fastapi_offline

from tests.support import ROOT
from tests.support.servers import Server

FOLDER = ROOT / "server" / "docs"
SWAGGER_UI = Path(fastapi_offline.__file__).parent / "static"


def test_the_page_and_all_it_names_come_from_here(live: Server) -> None:
    page = live.get("/docs")
    assert page.status_code == 200 and page.content == (FOLDER / "index.html").read_bytes()
    named = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert set(named) == {"data:,", "docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "docs/docs.js"}
    for name in named[1:]:
        answer = live.get(f"/{name}")
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        assert answer.headers["content-type"].split(";")[0] == kind
        folder = FOLDER if name == "docs/docs.js" else SWAGGER_UI
        assert answer.content == (folder / Path(name).name).read_bytes()
        again = live.get(f"/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
    style = live.get("/docs/swagger-ui.css").text
    assert "@import" not in style and all(url.startswith("data:") for url in re.findall(r"url\(\"?([^)]{5})", style))


def test_no_browser_would_let_it_reach_anything_else(live: Server) -> None:
    for path in ("/docs", "/docs/docs.js"):
        policy = live.get(path).headers["content-security-policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules.pop("style-src") == "'self' 'unsafe-inline'" and rules.pop("img-src") == "'self' data:"
        assert rules.pop("script-src") == rules.pop("connect-src") == "'self'"
        assert set(rules) == {"default-src", "base-uri", "form-action", "frame-ancestors"}
        assert set(rules.values()) == {"'none'"}


def test_there_is_nothing_else_below_it(live: Server) -> None:
    for name in ("redoc.standalone.js", "favicon.png", "..%2fserve.py", "%2fetc%2fpasswd", "", "docs.py"):
        assert live.get(f"/docs/{name}").status_code == 404
