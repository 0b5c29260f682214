"""GET /v1/models and /v1/adapters where there are many."""

from tests.support import GOLDEN
from tests.support.server_fixtures import StartFake

ADAPTER = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")


def test_lists_are_read_by_pages(start_fake: StartFake) -> None:
    server = start_fake()
    for i in range(7):
        server.post("/v1/adapters", {"name": f"n{i}", "path": ADAPTER}).raise_for_status()
    for path in ("/v1/adapters", "/v1/models"):
        whole = server.get(path).raise_for_status().json()
        assert "has_more" not in whole
        for limit in (1, 3, len(whole["data"]), 1000):
            found, more, after = [], True, ""
            while more:
                page = server.get(f"{path}?limit={limit}{after}").raise_for_status().json()
                assert 0 < len(page["data"]) <= limit
                found += page["data"]
                more, after = page["has_more"], f"&after={page['data'][-1]['id']}"
            assert found == whole["data"]
        for query in ("limit=0", "limit=1001", "limit=x", "after=nobody"):
            refused = server.get(f"{path}?{query}")
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, query.split("=")[0])


def test_pages_begin_behind_names_that_look_like_other_values(start_fake: StartFake) -> None:
    server = start_fake()
    names = ["0", "123", "false", "true"]
    for name in names:
        server.post("/v1/adapters", {"name": name, "path": ADAPTER}).raise_for_status()
    for before, name in zip(names, [*names[1:], None], strict=True):
        page = server.get(f"/v1/adapters?limit=1&after={before}").raise_for_status().json()
        assert [card["id"] for card in page["data"]] == ([name] if name else [])
