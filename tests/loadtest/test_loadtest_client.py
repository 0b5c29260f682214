"""Against a fake server of known delays and faults: what is measured is what was done."""

import asyncio
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tucka_runtime.loadtest.client import EventReader, LoadClient, ServerError
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.report import metrics
from tucka_runtime.loadtest.settings import Settings


def ask(url, count=1, tokens=8, model="base", **changes):
    """`count` requests, all at once."""

    async def go():
        async with LoadClient(Settings(url=url, **changes)) as client:
            body = client.body(model, "one two three", tokens, 0.0)
            return await asyncio.gather(*(client.generate(Record("load", model), body) for _ in range(count)))

    return asyncio.run(go())


@given(
    st.lists(st.sampled_from(["a", "{}", "x y", "[DONE]", "é\u2028"]), max_size=6),
    st.lists(st.integers(1, 7), min_size=1, max_size=200),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_events_are_found_however_the_bytes_are_cut(payloads, cuts, newline):
    wire = "".join(f": ping{newline}{newline}data: {p}{newline}{newline}" for p in payloads).encode()
    wire += b"\n" if newline == "\r" else b""  # a lone CR at the very end could be half of a CRLF
    stream, found, at = EventReader(), [], 0
    for cut in [*cuts, len(wire)]:
        found += stream.feed(wire[at : at + cut])
        at += cut
    assert [f.decode() for f in found] == payloads


def test_several_data_lines_make_one_event():
    assert EventReader().feed(b"event: x\ndata: a\ndata:b\nid: 1\n\n") == [b"a\nb"]


def test_known_delays_are_reported(fake):
    """TTFT 50 ms, ITL 10 ms. The server stamps what it sends, so that a busy machine's delays of the server are not
    held against the client: TTFT within 10 ms of what was sent, ITL and TPOT within 1 ms, on average."""
    [r, *_] = records = ask(fake(ttft=0.05, itl=0.01, stamps=True), count=4, tokens=20)
    summary = metrics.Figures(records, 1.0, {}).summary()
    assert [r.ok for r in records] == [True] * 4
    assert (r.prompt_tokens, r.output_tokens, r.finish_reason, len(r.events)) == (3, 20, "length", 20)
    sent = [[float(t) for t in r.text.split()] for r in records]
    true_ttft = np.mean([times[0] - r.start for r, times in zip(records, sent, strict=True)]) * 1000
    true_itl = np.mean([np.diff(times) for times in sent]) * 1000
    assert true_ttft >= 50 and true_itl == pytest.approx(10, abs=1)
    assert summary["mean_ttft_ms"] == pytest.approx(true_ttft, abs=10)
    assert summary["mean_itl_ms"] == pytest.approx(true_itl, abs=1)
    assert summary["mean_tpot_ms"] == pytest.approx(true_itl, abs=1)
    lags = [t - s for r, times in zip(records, sent, strict=True) for (t, _), s in zip(r.events, times, strict=True)]
    assert 0 < min(lags) < 0.005


def test_the_role_event_does_not_stop_the_clock(fake):
    [r] = ask(fake(ttft=0.08, itl=0.01, role_event_at=0.01, final_event=True), endpoint="chat")
    assert metrics.Latency(r).ttft >= 0.08
    assert metrics.Latency(r, count_empty=True).ttft < metrics.Latency(r).ttft - 0.04
    assert len(r.events) == 10
    assert len(metrics.Latency(r).itl) == 7


def test_reasoning_is_seen_and_is_no_answer(fake):
    [plain] = ask(fake(), endpoint="chat")
    [r] = ask(fake(ttft=0.02, itl=0.05, reasoning=6), endpoint="chat")
    assert 0.02 <= metrics.Latency(r).ttft < 0.2
    assert r.text == plain.text and "hm" not in r.text


def test_tokens_without_usage_are_the_events(fake):
    [r] = ask(fake(usage=False), tokens=6)
    assert r.output_tokens is None
    assert metrics.Latency(r).tokens == 6


def test_usage_counts_bundled_tokens(fake):
    [r] = ask(fake(bundle=4, itl=0.01), tokens=12)
    assert (len(r.events), metrics.Latency(r).tokens) == (3, 12)


@pytest.mark.parametrize(
    ("misbehave", "cause"),
    [
        ("status:429", "http_429"),
        ("status:503", "http_503"),
        ("cut", "disconnect"),
        ("error_event", "error_event"),
        ("garbage", "garbage"),
        ("stall", "timeout"),
    ],
)
def test_failures_by_cause(fake, misbehave, cause):
    [r] = ask(fake(every=1, misbehave=misbehave), timeout=0.5)
    assert r.cause == cause
    assert r.end >= r.start > 0


def test_an_end_without_done_or_reason_is_truncated(fake):
    [r] = ask(fake(every=0, done=False))
    assert r.ok  # finish_reason came
    [r] = ask(fake(), model="nobody")
    assert (r.cause, r.status) == ("http_404", 404)


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    [r] = ask(url)
    assert r.cause == "connect"

    async def discover():
        async with LoadClient(Settings(url=url)) as client:
            await client.models()

    with pytest.raises(ServerError, match="Is the server up"):
        asyncio.run(discover())


def test_not_an_openai_server(fake):
    async def discover():
        async with LoadClient(Settings(url=fake() + "/other")) as client:
            await client.models()

    with pytest.raises(ServerError, match="404"):
        asyncio.run(discover())


def test_extra_body_and_ignore_eos_are_sent():
    client = LoadClient(Settings(extra_body='{"route": "request"}', ignore_eos=True, url="http://x/v1/"))
    assert client.url == "http://x"
    body = client.body("m", "p", 3, 0.5)
    assert (body["route"], body["ignore_eos"], body["max_tokens"], body["temperature"]) == ("request", True, 3, 0.5)
