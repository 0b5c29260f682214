"""The channel between the two processes: what is sent is what is read, however the socket cuts it."""

import dataclasses
from array import array
from pathlib import Path
from typing import Any, get_args

import pytest

from tucka_runtime import channel, errors
from tucka_runtime.channel import PROTOCOL, ChannelError, Reader, frame
from tucka_runtime.channel_messages import (
    Abort,
    AdapterLoaded,
    AdapterPart,
    AdapterRead,
    AdapterRefused,
    AdapterSize,
    AdapterUnread,
    CombineAdapters,
    EvictAdapter,
    Idle,
    LoadAdapter,
    NotStarted,
    ReadAdapter,
    Rejected,
    SequencesAborted,
    Start,
    Started,
    StartReader,
    StepDone,
    Stop,
    Submit,
    TensorRun,
    UnloadAdapter,
)
from tucka_runtime.config import EngineConfig
from tucka_runtime.messages import (
    AdapterInfo,
    AdapterKey,
    BaseLayout,
    EngineInfo,
    EngineLoad,
    Finish,
    FinishReason,
    Pooling,
    Request,
    Route,
    RouteReport,
    RouteScope,
    SamplingParams,
    SequenceOutput,
    StepStats,
    Timing,
    TokenLogprob,
)

KEY, ROUTE, LOAD = AdapterKey("a", 2), Route(1, (0.25, 0.5)), EngineLoad(1, 2, 3, 4, 5, 6)
SAMPLING = SamplingParams(
    max_tokens=0,
    temperature=0.1,
    logit_bias=((5, -100.0),),
    allowed_token_ids=(1, 2),
    seed=2**63 - 1,
    logprobs=0,
    grammar="{}",
    stop=("\U0001f600", "\x00"),
)
SCORED = TokenLogprob(7, float("-inf"), 3, ((8, -0.5), (9, float("-inf"))))
OUTPUTS = [
    SequenceOutput("one", 0, [5]),
    SequenceOutput("two", 3, [6, 7], [SCORED, SCORED], [None, SCORED], cached_tokens=16),
    SequenceOutput("two", 4, [], finish=Finish(FinishReason.STOP, 2), route=RouteReport(ROUTE, 3)),
    SequenceOutput(
        "three",
        0,
        finish=Finish(FinishReason.ERROR, error=errors.NonFiniteError.of(True)),
        timing=Timing(1.0, 2.0, 3.0, 4.0),
    ),
    SequenceOutput("four", 0, embedding=array("f", (0.5, float("nan"), -1e-40))),
]
STATS = StepStats(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 7, 8, 9, (KEY,), ((KEY, ROUTE),))
INFO = EngineInfo("llama", 1, 2, (3, 4), "float32", "cpu", 5, "f", 6, "native", 7, 8, "int8")
ADAPTER = AdapterInfo(
    KEY, "d", "tucka", 8, 3, None, 2, 16.0, ("q", "v"), 4, None, "batch", 9, {"a": [1, None, "b"]}, 64, {"read": 0.1}
)
MESSAGES: list[Any] = [
    Start(EngineConfig(model="m", kv_cache_tokens=256), "json"),
    Submit(Request("id", ((1, 2), (3,)), SAMPLING, 2, KEY, RouteScope.REQUEST, "salt")),
    Submit(Request("id", ((1,),), SamplingParams(), route_scope=None, pooling=Pooling.LAST)),
    Abort("id"),
    Abort("id", 3),
    LoadAdapter(1, KEY, Path("/a/b"), ROUTE, "blob"),
    LoadAdapter(1, KEY, Path("c"), None, None, resident=False),
    CombineAdapters(
        1, KEY, (AdapterPart(Path("c"), ROUTE, "blob", 3, -0.5), AdapterPart(Path("d"), None, None, None, 1.0))
    ),
    EvictAdapter(KEY),
    UnloadAdapter(KEY),
    Stop(),
    Started(INFO, 0.5),
    NotStarted(errors.ModelLoadError("why")),
    StepDone(OUTPUTS, STATS, LOAD),
    Idle(LOAD),
    SequencesAborted(OUTPUTS[:1]),
    Rejected("id", errors.InvalidRequestError("what", "prompt")),
    AdapterLoaded(1, ADAPTER),
    AdapterRefused(2, errors.AdapterCapacityError("full")),
    StartReader(BaseLayout({"q": (1, 2)}, {"q.weight": (2, 1)}, "f", "name", "embed", "head", True), "text"),
    ReadAdapter(Path("/a/b"), "blob", 2**40),
    AdapterSize(2**33),
    AdapterRead(
        "lora",
        {"r": 8, "bias": "none"},
        "d",
        {"q": (0, 1, 2.0, None)},
        None,
        2,
        {"w": 3},
        {"a": [1]},
        {"e": (4, 5)},
        [TensorRun(64, "float32", ((6, 1), ()))],
    ),
    AdapterUnread(errors.InvalidAdapterError("why"), 3),
]


def plain(value: Any) -> Any:
    """Errors have no equality of their own."""
    if isinstance(value, errors.TuckaError):
        return type(value), value.message, value.param
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, array):
        return value.typecode, value.tobytes()
    if isinstance(value, list | tuple):
        return type(value), [plain(item) for item in value]
    return value


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_messages_arrive_as_they_were_sent(size: int) -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(channel.Message))
    data, reader = PROTOCOL + b"".join(map(frame, MESSAGES)), Reader()
    received = [m for i in range(0, len(data), size) for m in reader.feed(data[i : i + size])]
    assert plain(received) == plain(MESSAGES)


def every(kind: type[errors.TuckaError]) -> list[type[errors.TuckaError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in every(child))]


def test_every_error_arrives_as_itself() -> None:
    kinds = [kind for kind in every(errors.TuckaError) if kind.__module__ == errors.__name__]
    data = PROTOCOL + b"".join(frame(Rejected("id", kind("why", "param"))) for kind in kinds)
    assert [plain(message.error) for message in Reader().feed(data)] == [(kind, "why", "param") for kind in kinds]


def test_a_reader_that_raises_has_lost_no_place() -> None:
    """What was given out is not given out again, whatever became of who took it."""
    reader = Reader()
    first = next(reader.feed(PROTOCOL + frame(Abort("a")) + frame(Abort("b"))))
    assert [first, *reader.feed(b"")] == [Abort("a"), Abort("b")]


@pytest.mark.parametrize(
    "data",
    [
        bytes(len(PROTOCOL)),
        PROTOCOL + b"\0\0\0\1\xff\0",
        PROTOCOL + b"\0\0\0\1\0\0",
        PROTOCOL + b"\0\0\0\1\0\xc1",
    ],
    ids=["another version", "no such kind", "not its fields", "no msgpack"],
)
def test_what_is_no_message_of_ours_is_refused(data: bytes) -> None:
    with pytest.raises(ChannelError):
        list(Reader().feed(data))


@pytest.mark.parametrize(("module", "name"), [(channel.channel_messages, "Idle"), (channel.messages, "Timing")])
def test_the_protocol_changes_with_a_field(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = channel._protocol()
    monkeypatch.setattr(module, name, dataclasses.make_dataclass(name, [("other", int)]))
    assert before == PROTOCOL != channel._protocol()
