"""The console's files over a socket: who gets them, with which headers, and what they hold."""

import re

import pytest

from tests.support import ROOT
from tests.support.servers import Server

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
FOLDER = ROOT / "server" / "console"
FILES = sorted(path.name for path in FOLDER.iterdir())
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}


@pytest.fixture
def server(start_fake) -> Server:
    return start_fake(api_key=("user",), admin_key=("admin",))


def status(server: Server, head: str) -> int:
    """Of a request as it is written here: clients would tidy its path."""
    return int(server.raw(f"{head}\r\nHost: x\r\nConnection: close\r\n\r\n".encode()).split()[1])


@pytest.mark.parametrize("path", ["/", *(f"/console/{name}" for name in FILES)])
def test_a_browser_gets_every_file_without_a_key_and_with_all_headers(server: Server, path: str) -> None:
    answer = server.get(path, headers=BROWSER)
    name = path.removeprefix("/console/") if path != "/" else "index.html"
    assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
    policy = answer.headers["content-security-policy"]
    assert dict(part.strip().split(" ", 1) for part in policy.split(";")) == POLICY
    expected = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert answer.headers["content-type"].split(";")[0] == expected[name[name.rindex(".") :]]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    head = server.client.head(server.url + path, headers=BROWSER)
    assert head.headers["content-length"] == str(len(answer.content)) and not head.content
    for tag in (answer.headers["etag"], f"W/{answer.headers['etag']}", f'"x", {answer.headers["etag"]}'):
        again = server.get(path, headers=BROWSER | {"if-none-match": tag})
        assert again.status_code == 304 and not again.content and again.headers["etag"] == answer.headers["etag"]
    assert server.get(path, headers=BROWSER | {"if-none-match": '"x"'}).status_code == 200


@pytest.mark.parametrize("accept", ["*/*", "application/json", None])
def test_programs_get_what_they_always_got(server: Server, accept: str | None) -> None:
    headers = {"authorization": "Bearer user"} | ({"accept": accept} if accept else {})
    answer = server.get("/", headers=headers)
    assert answer.json()["models"] == "/v1/models" and answer.headers["vary"] == "Accept"
    assert server.get("/", headers={"accept": accept} if accept else {}).status_code == 401
    assert server.get("/", headers=BROWSER).headers["vary"] == "Accept"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("GET /console HTTP/1.1", 401),
        ("GET /consolex/index.html HTTP/1.1", 401),
        ("GET /v1/models HTTP/1.1\r\nAccept: text/html", 401),
        ("POST / HTTP/1.1\r\nAccept: text/html\r\nContent-Length: 0", 401),
        ("GET // HTTP/1.1\r\nAccept: text/html", 401),
        ("GET /console/ HTTP/1.1", 404),
        ("GET /console/nothing.js HTTP/1.1", 404),
        ("GET /console/../v1/models HTTP/1.1", 404),
        ("GET /console/..%2fv1/models HTTP/1.1", 404),
        ("GET /console/..%2fserve.py HTTP/1.1", 404),
        ("GET /console/%2fetc%2fpasswd HTTP/1.1", 404),
        ("POST /console/index.html HTTP/1.1\r\nContent-Length: 0", 405),
    ],
)
def test_nothing_else_is_open(server: Server, head: str, expected: int) -> None:
    assert status(server, head) == expected


def test_no_console(start_fake) -> None:
    server = start_fake(console=False)
    answer = server.get("/", headers=BROWSER)
    assert answer.json()["models"] == "/v1/models" and "vary" not in answer.headers
    assert server.get("/console/index.html").status_code == 404
    locked = start_fake(console=False, api_key=("user",))
    for path in ("/", "/console/index.html"):
        assert locked.get(path, headers=BROWSER).status_code == 401


def test_the_files_name_each_other_and_nobody_else() -> None:
    """All that is named is there, all that is there is named, and the HTML holds nothing that the policy refuses."""
    texts = {name: (FOLDER / name).read_text() for name in FILES}
    named = set(re.findall(r'(?:href|src)="console/([^"]+)"', texts["index.html"]))
    named |= {name for text in texts.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named | {"index.html"} == set(FILES)
    for name, text in texts.items():
        assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"(inner|outer|Adjacent)HTML|document\.write|\beval\b|(local|session)Storage", text), name
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", texts["index.html"])
