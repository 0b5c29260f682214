"""The console, and the API's description, in a real Chromium, against a real server and a fake one."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.api_keys import write_keys
from tests.support.servers import Server, series
from tucka_runtime.errors import OverloadedError

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCRIPT = "<img src=x onerror=\"document.title='bad'\"><script>document.title='bad'</script>&amp; **text**"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"there is no Chromium here, as {' or '.join(NAMES)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


class Visit:
    """A page, and what its browser complained of: `errors` but for HTTP statuses, which it tells as errors too."""

    def __init__(self, chromium: Any, server: Server, path: str = "/", **settings: Any):
        self.server = server
        self.context = chromium.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.errors: list[str] = []
        self.urls: list[str] = []
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._heard)
        self.page.goto(server.url + path)

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def state(self, state: str) -> None:
        self.page.wait_for_selector(f"#state[data-state={state}]")

    def ended(self, count: int) -> list[Any]:
        """The answers, when all of them have come to an end."""
        self.page.wait_for_selector("#send:enabled")
        cards = self.page.query_selector_all("article[aria-busy=false]")
        assert len(cards) == count
        return cards

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    visits: list[Visit] = []

    def go(server: Server, path: str = "/", **settings: Any) -> Visit:
        visits.append(Visit(chromium, server, path, **settings))
        return visits[-1]

    yield go
    for each in visits:
        each.context.close()
        assert each.errors == []
        assert all(url.startswith(each.server.url + "/") for url in each.urls)


def load(server: Server, *names: str, key: str = "none") -> None:
    for name in names:
        body = {"name": name, "path": f"{GOLDEN}/llama-qv-r8k3t3/adapter"}
        server.post("/v1/adapters", body, headers={"authorization": f"Bearer {key}"}).raise_for_status()


def test_the_base_and_two_adapters_by_keyboard_with_their_routes(live: Server, visit: Any) -> None:
    seen = visit(live)
    page = seen.page
    seen.state("ready")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.type("hello")
    page.select_option("#route", "request")
    page.fill("#max-tokens", "40")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    seen.ended(3)
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "route": "request"}
    for name, groups in (("one", 3), ("two", 2)):
        card = f"article[data-model={name}]"
        answer = live.post("/v1/chat/completions", body | {"model": name, "include_route": True}).json()
        route = answer["choices"][0]["route"]
        assert f"Group {route['group']} by the request" in seen.text(f"{card} .routed")
        assert seen.text(f"{card} .weights") == " · ".join(f"{weight:.3f}" for weight in route["weights"])
        assert len(page.query_selector_all(f"{card} .route .track")) == groups * len(route["weights"])
        assert re.search(r"First token\s+[\d,]+ ms\s+Speed\s+[\d,]+ tokens/s\s+Length\s+\d+ tokens", seen.text(card))
    assert seen.text("article[data-model=llama-tiny] .foot") == "The base has no route."
    page.wait_for_selector(".experts[data-model=one] >> text=passes")
    passes = sum(v for k, v in series(live).items() if k.startswith('tucka_adapter_group_selections_total{model="one"'))
    page.wait_for_selector(f".experts[data-model=one] >> text={passes:,.0f} passes")
    assert len(page.query_selector_all("#tiles .tile .spark polyline")) == 4


def test_an_alias_shows_the_route_of_the_adapter_that_answers(live: Server, visit: Any) -> None:
    live.post("/v1/aliases", {"name": "alias", "targets": {"one": 1}}).raise_for_status()
    try:
        seen = visit(live)
        seen.state("ready")
        for box in seen.page.query_selector_all("#names input"):
            box.set_checked(box.get_attribute("value") == "alias")
        seen.page.fill("#prompt", "hello")
        seen.page.click("#send")
        seen.ended(1)
        card = "article[data-model=alias]"
        assert seen.text(f"{card} header .note") == "alias"
        assert "Group" in seen.text(f"{card} .routed")
        assert len(seen.page.query_selector_all(f"{card} .route .track")) == 9
        assert not seen.errors
    finally:
        httpx.delete(f"{live.url}/v1/aliases/alias").raise_for_status()


def test_streams_run_side_by_side_and_stop(start_fake: Any, visit: Any) -> None:
    server = start_fake()
    load(server, "one", "two")
    server.engine.seconds_per_token = 0.05
    seen = visit(server)
    seen.state("ready")
    seen.page.fill("#prompt", "hello")
    seen.page.click("#send")
    for name in ("base", "one", "two"):
        seen.page.wait_for_selector(f"article[data-model={name}][aria-busy=true] .said")
    seen.page.click("article[data-model=one] button")
    seen.page.wait_for_selector("article[data-model=one][aria-busy=false]")
    assert seen.page.query_selector("article[data-model=two][aria-busy=true]"), "one answer's end is not the others'"
    seen.page.keyboard.press("Escape")
    assert all("stopped" in card.inner_text() for card in seen.ended(3))
    deadline = time.monotonic() + 10
    while len(server.engine.aborted) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.engine.aborted == {request.id for request in server.engine.requests}


def test_keys_are_asked_for_and_kept_in_memory_alone(start_fake: Any, visit: Any) -> None:
    server = start_fake(api_key=("user-key",), admin_key=("admin-key",))
    load(server, "one", key="admin-key")
    seen = visit(server)
    page = seen.page
    seen.state("locked")
    assert "wants a key" in seen.text("#trouble") and page.evaluate("document.activeElement.id") == "user-key"
    page.keyboard.type("user-key")
    page.keyboard.press("Enter")
    seen.state("ready")
    assert seen.text("#trouble") == "" and not page.is_visible("#user-key")
    page.fill("#load-name", "team/two")
    page.fill("#load-path", "llama-qv-r8k3t3/adapter")
    page.keyboard.press("Enter")
    page.wait_for_selector("#adapters-problem >> text=admin key")
    page.click("#keys summary")
    page.fill("#admin-key", "admin-key")
    page.click("#use-keys")
    page.click("#load-form button")
    page.wait_for_selector("#adapters-done >> text=team/two is loaded.")
    page.wait_for_selector("#names input[value='team/two']")
    page.focus("#adapter-list li[data-model='team/two'] button")
    page.keyboard.press("Enter")
    assert "team/two" in seen.text("dialog[open]")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#adapters-done >> text=team/two is unloaded.")
    assert not page.query_selector("#names input[value='team/two']")
    assert "key" not in page.url and not any("-key" in url for url in seen.urls)
    stored = "[localStorage.length, sessionStorage.length, document.cookie, (await indexedDB.databases()).length]"
    assert page.evaluate(f"async () => {stored}") == [0, 0, "", 0]
    assert seen.context.cookies() == []
    page.reload()
    seen.state("locked")


def test_a_key_that_may_only_ask_sees_its_own_models(start_fake: Any, visit: Any, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", mine={"adapters": ("one",)})
    server = start_fake(api_key_file=str(tmp_path / "keys"), admin_key=("admin-key",))
    load(server, "one", "other", key="admin-key")
    seen = visit(server)
    seen.state("locked")
    seen.page.keyboard.type(keys["mine"])
    seen.page.keyboard.press("Enter")
    seen.state("ready")
    assert [box.get_attribute("value") for box in seen.page.query_selector_all("#names input")] == ["one"]
    assert "has not the role metrics" in seen.text("#tiles") and "other" not in seen.text("body")
    seen.page.fill("#prompt", "hello")
    seen.page.click("#send")
    seen.ended(1)


def test_what_the_model_writes_is_text(start_fake: Any, visit: Any) -> None:
    server = start_fake()
    server.engine.script = SCRIPT
    seen = visit(server)
    seen.state("ready")
    seen.page.fill("#prompt", SCRIPT)
    seen.page.click("#send")
    (card,) = seen.ended(1)
    assert card.query_selector(".said").inner_text() == SCRIPT
    assert not seen.page.query_selector("article img, article script") and seen.page.title() == "TuckA runtime"


def test_errors_say_what_happened_and_what_to_do(start_fake: Any, visit: Any) -> None:
    server = start_fake()
    seen = visit(server)
    seen.state("ready")
    seen.page.click("#send")
    assert seen.text("#ask-problem") == "The prompt is empty. Type one."
    seen.page.fill("#prompt", "hello")

    def said() -> str:
        seen.page.click("#send")
        (card,) = seen.ended(1)
        return card.query_selector(".problem").inner_text()

    server.engine.submit_error = OverloadedError("The queue is full.")
    assert said() == "The queue is full. It can be tried again in 1 s."
    server.engine.submit_error, server.engine.fail_after = None, 3
    assert said().startswith("The fake engine died")
    assert len(seen.text("article .said")) == 3, "what came before stays"
    seen.context.set_offline(True)
    assert said().startswith("The server cannot be reached. See whether it runs")
    seen.state("away")
    seen.context.set_offline(False)
    seen.state("ready")
    assert seen.text("#trouble") == ""


@pytest.mark.parametrize("width", [360, 1440])
def test_it_fits_and_can_be_used_in_light_and_dark(start_fake: Any, visit: Any, width: int) -> None:
    server = start_fake()
    load(server, "one", "a-name/" + "x" * 100)
    server.engine.script = "unbroken" * 60
    paper = set()
    for scheme in ("light", "dark"):
        seen = visit(server, viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
        seen.state("ready")
        seen.page.fill("#prompt", "hello")
        seen.page.click("#send")
        seen.ended(3)
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        paper.add(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((field) => !field.labels.length)"
        assert seen.page.evaluate(f"{unnamed}.map((field) => field.id)") == []
        seen.page.focus("#send")
        seen.page.keyboard.press("Shift+Tab")
        outline = seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", "what has the focus shows it"
    assert len(paper) == 2


def test_the_description_is_shown_by_this_server_alone(live: Server, visit: Any) -> None:
    """That nothing else is asked, and nothing complained of, is looked at as the visit ends."""
    page = visit(live, "/docs").page
    page.click("#operations-default-post_v1_completions button.opblock-summary-control")
    page.click("button.try-out__btn")
    page.fill("textarea.body-param__text", '{"model": "llama-tiny", "prompt": "hi", "max_tokens": 2}')
    page.click("button.execute")
    page.wait_for_selector(".live-responses-table >> text=text_completion")
