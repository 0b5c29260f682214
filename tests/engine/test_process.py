"""The engine's process: adapters come and go beside requests, it dies and comes back, it never outlives its parent."""

import asyncio
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import GREEDY, Answer, ask, build, prompt, run, save_lora, save_model, save_tucka
from tests.support.processes import PATIENCE, check_ends_with_parent
from tucka_runtime import channel, children
from tucka_runtime.channel import PROTOCOL
from tucka_runtime.channel_messages import UnloadAdapter
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine import child as engine_child
from tucka_runtime.engine import client as engine_client
from tucka_runtime.engine import process
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.engine.output_stream import OutputStream
from tucka_runtime.errors import (
    AdapterCapacityError,
    AdapterConflictError,
    EngineDeadError,
    InvalidAdapterError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    OverloadedError,
)
from tucka_runtime.messages import AdapterKey, EngineLoad, FinishReason, Request, Route, RouteScope, StepStats

TUCKA, LORA, PINNED = AdapterKey("tucka", 1), AdapterKey("lora", 1), AdapterKey("pinned", 7)
ROUTE = Route(1, (0.5, 0.625))
LONG = replace(GREEDY, max_tokens=4000)  # longer than any test
SHORT = replace(GREEDY, max_tokens=6, logprobs=2)


class Watched(EngineClient):
    """Says when it has noticed that its process is gone or hangs, and remembers the ones it started."""

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.noticed = asyncio.Event()
        self.spawned: list[int] = []

    async def _spawn(self) -> Any:
        info = await super()._spawn()
        assert self.pid is not None
        self.spawned.append(self.pid)
        return info

    def _lost(self, why: str) -> None:
        super()._lost(why)
        self.noticed.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two adapters for it."""
    folder = tmp_path_factory.mktemp("worker")
    save_model(folder / "model", max_position_embeddings=8192)
    layout = build(folder / "model", kv_cache_tokens=8192).layout
    save_tucka(folder / "tucka", layout)
    save_lora(folder / "lora", layout)
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> EngineConfig:
    return EngineConfig(
        model=str(folder / "model"),
        device="cpu",
        kv_cache_tokens=32768,
        num_threads=1,
        max_num_seqs=4,
        max_queue=2,
        adapter_slots=3,
    )


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def shared(loop: asyncio.Runner, config: EngineConfig) -> Iterator[Watched]:
    async def start() -> Watched:
        client = Watched(config)
        await client.start()
        return client

    client = loop.run(start())
    yield client
    loop.run(client.stop(PATIENCE))


@pytest.fixture
def client(shared: Watched, loop: asyncio.Runner) -> Iterator[Watched]:
    """The shared engine, handed over and taken back without requests or adapters."""
    shared.on_step = shared.on_idle = shared.on_restart = None
    yield shared
    for stream in list(shared._streams.values()):
        stream.abort()

    async def clean() -> None:
        for key in (TUCKA, LORA, PINNED):
            shared.unload_adapter(key)
        await collect(shared.submit(ask(prompt(3), id="last", sampling=replace(GREEDY, max_tokens=1))))

    loop.run(patiently(clean()))
    assert shared.ready
    assert not shared.in_flight


async def patiently(work: Coroutine[Any, Any, Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        return await work


async def collect(stream: OutputStream) -> list[Answer]:
    answers: dict[int, Answer] = {}
    async for outputs in stream:
        for out in outputs:
            answers.setdefault(out.index, Answer()).take(out)
    assert all(answer.finish_reason is not None for answer in answers.values())
    return [answers[i] for i in sorted(answers)]


async def leftovers(stream: OutputStream) -> None:
    """Reads to the end of a stream that will not end by itself."""
    async for outputs in stream:
        assert not any(out.finish for out in outputs)


async def first(stream: OutputStream) -> None:
    """Returns when the request is being generated."""
    await anext(stream)


def expected(folder: Path, request: Request) -> list[Answer]:
    """The same request in an engine of this process, alone."""
    engine = build(folder / "model", kv_cache_tokens=8192)
    engine.load_adapter(TUCKA, folder / "tucka")
    engine.load_adapter(LORA, folder / "lora")
    engine.load_adapter(PINNED, folder / "tucka", ROUTE)
    (answers,) = run(engine, request)
    return answers


def test_kernels_that_cannot_run_here_are_an_answer(
    loop: asyncio.Runner, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelLoadError, match="need a GPU"):
        loop.run(EngineClient(replace(config, kernels="fused")).start())


def test_what_comes_out_is_what_the_engine_computes(client: Watched, loop: asyncio.Runner, folder: Path):
    requests = [
        ask(prompt(9), prompt(4), id="base", sampling=replace(SHORT, prompt_logprobs=1), n=2),
        ask(prompt(12), id="tucka", sampling=SHORT, adapter=TUCKA, scope=RouteScope.REQUEST),
        ask(prompt(5), id="lora", sampling=SHORT, adapter=LORA),
        ask(prompt(7), id="pinned", sampling=SHORT, adapter=PINNED),
    ]

    async def main() -> list[list[Answer]]:
        await client.load_adapter(TUCKA, folder / "tucka")
        await client.load_adapter(LORA, folder / "lora")
        info = await client.load_adapter(PINNED, folder / "tucka", ROUTE)
        assert info.key == PINNED
        assert info.scope == RouteScope.PINNED
        return [await collect(client.submit(request)) for request in requests]

    answers = loop.run(patiently(main()))
    for request, mine in zip(requests, answers, strict=True):
        theirs = expected(folder, request)
        assert len(mine) == request.num_sequences
        for a, b in zip(mine, theirs, strict=True):
            assert a.token_ids == b.token_ids
            assert [entry.logprob for entry in a.logprobs] == pytest.approx([e.logprob for e in b.logprobs], abs=1e-4)
            assert (a.prompt_logprobs is None) == (b.prompt_logprobs is None)
            assert (a.route is None) == (b.route is None)
            assert a.finish_reason is b.finish_reason is FinishReason.LENGTH


def test_adapters_come_and_go_beside_requests(client: Watched, loop: asyncio.Runner, folder: Path):
    """An adapter that is unloaded while a request uses it serves that request to its end, and no other."""
    sampling = replace(GREEDY, max_tokens=120)
    request = ask(prompt(11), id="adapted", sampling=sampling, adapter=LORA)

    async def main() -> list[Answer]:
        busy = client.submit(ask(prompt(5), id="busy", sampling=LONG))
        await first(busy)
        await client.load_adapter(LORA, folder / "lora")
        with pytest.raises(AdapterConflictError):
            await client.load_adapter(LORA, folder / "lora")
        stream = client.submit(request)
        early = await anext(stream)
        client.unload_adapter(LORA)
        with pytest.raises(ModelNotFoundError):
            await collect(client.submit(ask(prompt(3), id="late", sampling=SHORT, adapter=LORA)))
        answer = Answer()
        for outputs in (early, *[outputs async for outputs in stream]):
            for out in outputs:
                answer.take(out)
        await client.load_adapter(LORA, folder / "lora")  # its place was freed with the last lease
        client.unload_adapter(LORA)
        client.unload_adapter(AdapterKey("never heard of", 1))
        busy.abort()
        return [answer]

    (answer,) = loop.run(patiently(main()))
    (alone,) = expected(folder, request)
    assert answer.token_ids == alone.token_ids
    assert answer.finish_reason is FinishReason.LENGTH


def test_bad_adapters_leave_it_running(client: Watched, loop: asyncio.Runner, folder: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / name).write_bytes((folder / "tucka" / name).read_bytes()[:-20])

    async def main() -> None:
        pid = client.pid
        busy = client.submit(ask(prompt(5), id="busy", sampling=LONG))
        await first(busy)
        for path in (broken, tmp_path / "nowhere", folder / "model", tmp_path):
            with pytest.raises(InvalidAdapterError):
                await client.load_adapter(TUCKA, path)
        with pytest.raises(InvalidAdapterError, match="pinned"):
            await client.load_adapter(PINNED, folder / "tucka", Route(3, (0.5, 0.5)))
        for generation in range(client.config.adapter_slots):
            await client.load_adapter(AdapterKey("many", generation), folder / "lora")
        with pytest.raises(AdapterCapacityError):
            await client.load_adapter(TUCKA, folder / "tucka")
        for generation in range(client.config.adapter_slots):
            client.unload_adapter(AdapterKey("many", generation))
        await client.load_adapter(TUCKA, folder / "tucka")
        await first(busy)
        assert client.pid == pid
        assert client.restarts == 0

    loop.run(patiently(main()))


def test_requests_that_cannot_run_are_refused_alone(client: Watched, loop: asyncio.Runner):
    async def main() -> None:
        busy = client.submit(ask(prompt(5), id="busy", sampling=LONG))
        await first(busy)
        for request, error in (
            (ask((), id="empty"), InvalidRequestError),
            (ask(prompt(10), id="long", sampling=replace(GREEDY, max_tokens=8183)), InvalidRequestError),
            (ask(prompt(10), id="unknown", adapter=TUCKA), ModelNotFoundError),
        ):
            with pytest.raises(error):
                await collect(client.submit(request))
        await first(busy)
        assert client.in_flight == 1

    loop.run(patiently(main()))


def test_the_queue_is_bounded(client: Watched, loop: asyncio.Runner):
    """Four run and two wait; then requests are refused at once, until there is room again."""

    async def main() -> None:
        streams = [client.submit(ask(prompt(4, i), id=f"long{i}", sampling=LONG)) for i in range(4)]
        await asyncio.gather(*map(first, streams))
        waiting = client.submit(ask(prompt(5), prompt(6), id="waiting", sampling=SHORT))
        assert client.in_flight == 6
        with pytest.raises(OverloadedError):
            client.submit(ask(prompt(7), id="refused", sampling=SHORT))
        with pytest.raises(InvalidRequestError, match="at most 6"):
            client.submit(ask(prompt(7), id="never fits", sampling=SHORT, n=7))
        streams[0].abort()
        assert client.in_flight == 5
        accepted = client.submit(ask(prompt(7), id="accepted", sampling=SHORT))
        assert len(await collect(waiting)) == 2
        assert len(await collect(accepted)) == 1
        assert client.in_flight == 3

    loop.run(patiently(main()))


def test_abort_frees_pages(client: Watched, loop: asyncio.Runner):
    async def main() -> None:
        steps: list[tuple[StepStats, EngineLoad]] = []
        idle: list[EngineLoad | None] = []
        client.on_step, client.on_idle = lambda *step: steps.append(step), idle.append
        streams = [client.submit(ask(prompt(100, i), id=f"long{i}", sampling=LONG)) for i in range(3)]
        await asyncio.gather(*map(first, streams))
        assert steps[-1][1].blocks_used >= 3 * 6
        idle.clear()  # an engine without work says so every second
        late = client.submit(ask(prompt(100), id="late", sampling=LONG))  # the engine has not seen a step of it
        for stream in (*streams, late):
            stream.abort()
            stream.abort()
            assert stream.unfinished == 0
        await asyncio.gather(*map(leftovers, (*streams, late)))
        assert client.in_flight == 0
        while not idle:
            await asyncio.sleep(0.01)
        assert idle[0] is not None
        assert (idle[0].running, idle[0].waiting, idle[0].blocks_used) == (0, 0, 0)
        steps.clear()
        await collect(client.submit(ask(prompt(3), id="after", sampling=replace(GREEDY, max_tokens=2))))
        stats, load = steps[-1]
        assert (load.running, load.blocks_used, stats.decode_tokens) == (0, 0, 1)

    loop.run(patiently(main()))


def test_kill_9_ends_every_stream_and_it_comes_back(
    client: Watched, loop: asyncio.Runner, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Twice: the second time while its adapters are being brought back."""
    monkeypatch.setattr(engine_client, "FIRST_RESTART_DELAY", 0.01)
    request = ask(prompt(8), id="again", sampling=SHORT, adapter=TUCKA, scope=RouteScope.REQUEST)
    ready_meanwhile: list[bool] = []

    async def main() -> list[Answer]:
        client.noticed.clear()
        client.spawned.clear()
        idle: list[EngineLoad | None] = []
        client.on_idle = idle.append
        await client.load_adapter(TUCKA, folder / "tucka")
        streams = [client.submit(ask(prompt(9, i), id=f"r{i}", sampling=LONG, adapter=TUCKA)) for i in range(2)]
        streams.append(client.submit(ask(prompt(9), prompt(3), id="base", sampling=LONG)))
        await asyncio.gather(*map(first, streams))

        async def bring_back() -> None:
            ready_meanwhile.append(client.ready)
            if len(ready_meanwhile) == 1:
                assert client.pid is not None
                os.kill(client.pid, signal.SIGKILL)
            await client.load_adapter(TUCKA, folder / "tucka")

        client.on_restart = bring_back
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        loading = asyncio.gather(client.load_adapter(LORA, folder / "lora"), return_exceptions=True)
        for stream in streams:
            with pytest.raises(EngineDeadError):
                await leftovers(stream)
        await client.noticed.wait()
        (failed,) = await loading
        assert isinstance(failed, EngineDeadError)
        assert not client.ready
        assert client.in_flight == 0
        with pytest.raises(EngineDeadError):
            client.submit(ask(prompt(3), id="too early"))
        with pytest.raises(EngineDeadError):
            await client.load_adapter(PINNED, folder / "tucka", ROUTE)
        client.unload_adapter(LORA)
        for stream in streams:
            stream.abort()
        assert client._restart is not None
        await client._restart
        assert client.ready
        assert ready_meanwhile == [False, False]
        assert idle.count(None) == 2, "each death is told"
        assert idle[-1] is not None, "and the new engine's own account"
        assert client.restarts == 2
        answers = await collect(client.submit(request))
        assert len(client.spawned) == 2, "each death is answered by one new process"
        return answers

    (answer,) = loop.run(patiently(main()))
    (alone,) = expected(folder, request)
    assert answer.token_ids == alone.token_ids


async def frozen(client: Watched) -> None:
    """Stops the process; returns when the client has noticed."""
    client.noticed.clear()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    await client.noticed.wait()


def impatient(client: Watched, monkeypatch: pytest.MonkeyPatch, seconds: int = 1) -> None:
    monkeypatch.setattr(engine_client, "FIRST_RESTART_DELAY", 0.01)
    monkeypatch.setattr(client, "config", replace(client.config, engine_timeout=seconds))
    monkeypatch.setattr(client, "_longest_step", 0.0)


def test_row_48_an_engine_that_hangs_is_killed_and_comes_back(
    client: Watched, loop: asyncio.Runner, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in the middle of requests; the next test stops one without work."""
    impatient(client, monkeypatch)

    async def bring_back() -> None:
        await client.load_adapter(TUCKA, folder / "tucka")

    async def main() -> None:
        client.spawned.clear()
        await bring_back()
        client.on_restart = bring_back
        old = client.pid
        streams = [client.submit(ask(prompt(9, i), id=f"r{i}", sampling=LONG, adapter=TUCKA)) for i in range(2)]
        await asyncio.gather(*map(first, streams))
        await frozen(client)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="did not answer for"):
                await leftovers(stream)
        assert not client.ready
        assert client._restart is not None
        await client._restart
        assert client.ready and len(client.spawned) == 1 and client.pid != old
        with pytest.raises(ProcessLookupError):
            os.kill(old or 0, 0)
        await collect(client.submit(ask(prompt(4), id="again", sampling=SHORT, adapter=TUCKA)))

    loop.run(patiently(main()))


def test_nothing_blocks_while_the_engine_hangs(client: Watched, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch):
    """Clients come and go, far more than a socket holds; their number among what is unsent is bounded."""
    impatient(client, monkeypatch, 3)

    async def main() -> None:
        refused = 0
        noticing = asyncio.create_task(frozen(client))
        await asyncio.sleep(0)
        for i in range(500):
            begin = time.monotonic()
            try:
                client.submit(ask(prompt(2000, i), id=f"r{i}", sampling=LONG)).abort()
            except OverloadedError:
                refused += 1
            assert time.monotonic() - begin < 1
            await asyncio.sleep(0)
        assert refused > 300
        assert client._child is not None and client._child.unsent < 300
        await noticing
        assert client._restart is not None
        await client._restart

    loop.run(patiently(main()))


def test_work_and_idleness_are_not_mistaken_for_hanging(
    client: Watched, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
):
    """Nor is this process's own standing still, in which it hears nothing."""
    impatient(client, monkeypatch, 2)

    async def main() -> None:
        pid = client.pid
        await asyncio.sleep(2.5)
        time.sleep(3)
        busy = client.submit(ask(prompt(9), id="busy", sampling=LONG))
        begin = time.monotonic()
        async for _ in busy:
            if time.monotonic() - begin > 2.5:
                break
        assert client.pid == pid and client.ready and client.silence < 2

    loop.run(patiently(main()))


def test_starting_has_a_limit(loop: asyncio.Runner, config: EngineConfig, monkeypatch: pytest.MonkeyPatch):
    """A process that neither loads nor dies."""
    monkeypatch.setattr(children, "python", lambda *arguments: ["sleep", "600"])

    async def main() -> None:
        client = Watched(replace(config, engine_start_timeout=1))
        with pytest.raises(EngineDeadError, match="--engine-start-timeout"):
            await client.start()
        await client.stop(PATIENCE)
        assert client._last is not None
        assert client._last._process.returncode == -signal.SIGKILL

    loop.run(patiently(main()))


def test_an_engine_of_other_files_is_not_spoken_to(
    loop: asyncio.Runner, config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As after an upgrade under a running server, whose engine is then started anew."""
    monkeypatch.setattr(engine_child, "PROTOCOL", bytes(len(PROTOCOL)))

    async def main() -> None:
        client = Watched(config)
        monkeypatch.setattr(channel, "PROTOCOL", bytes(len(PROTOCOL)))  # what this process expects in return
        with pytest.raises(EngineDeadError):
            await client.start()
        assert "restart it" in caplog.text
        await client.stop(PATIENCE)
        assert client._last is not None
        assert client._last._process.returncode not in (0, None)

    loop.run(patiently(main()))


def test_a_model_that_cannot_be_loaded_is_not_tried_again(loop: asyncio.Runner, config: EngineConfig, tmp_path: Path):
    async def main() -> None:
        client = Watched(replace(config, model=str(tmp_path)))
        with pytest.raises(ModelLoadError, match=r"config\.json"):
            await client.start()
        await client.noticed.wait()
        assert client._restart is None
        assert client.restarts == 0
        assert not client.ready
        with pytest.raises(EngineDeadError):
            client.submit(ask(prompt(3)))
        await client.stop(PATIENCE)

    loop.run(patiently(main()))


def test_stop_ends_the_process_and_the_streams(loop: asyncio.Runner, config: EngineConfig):
    async def main() -> None:
        client = Watched(config)
        info = await client.start()
        assert info.max_model_len == 8192
        stream = client.submit(ask(prompt(5), id="busy", sampling=LONG))
        await first(stream)
        await client.stop(PATIENCE)
        with pytest.raises(EngineDeadError):
            await leftovers(stream)
        assert client._last is not None
        assert client._last._process.returncode == 0
        await client.noticed.wait()
        assert client._restart is None
        assert not client.ready

    loop.run(patiently(main()))


PARENT = """
import asyncio, sys
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.messages import Request, SamplingParams

async def main():
    client = EngineClient(EngineConfig(model=sys.argv[1], device="cpu", kv_cache_tokens=8192, num_threads=1))
    await client.start()
    stream = client.submit(Request("r", ((5, 6, 7),), SamplingParams(max_tokens=8000, ignore_eos=True)))
    await anext(stream)
    print(client.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_it_does_not_outlive_its_parent(folder: Path, stopped: bool):
    """The parent is killed in the middle of a request, and where the engine hangs as well."""
    check_ends_with_parent([sys.executable, "-P", "-c", PARENT, str(folder / "model")], stopped)


def test_one_sequence_ends_and_its_siblings_go_on(client: Watched, loop: asyncio.Runner):
    """As when a stop string is found, which the engine does not know of."""

    async def one_of_two() -> dict[int, list[FinishReason | None]]:
        stream = client.submit(ask(prompt(5), id="two", sampling=replace(GREEDY, max_tokens=40), n=2))
        reasons: dict[int, list[FinishReason | None]] = {0: [], 1: []}
        async for outputs in stream:
            for output in outputs:
                reasons[output.index].append(output.finish.reason if output.finish else None)
                if len(reasons[0]) == 2 and output.index == 0:
                    stream.end(0)
        return reasons

    reasons = loop.run(one_of_two())
    assert len(reasons[1]) == 40 and reasons[1][-1] is FinishReason.LENGTH
    assert len(reasons[0]) < 40 and reasons[0][-1] is FinishReason.ABORT


def test_a_process_that_cannot_be_started_is_tried_again(
    client: Watched, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
):
    """As when memory is short right after the old engine was killed for it."""
    real, refused = subprocess.Popen, []

    def popen(*args: Any, **options: Any) -> Any:
        if not refused:
            refused.append(args)
            raise OSError("Cannot allocate memory")
        return real(*args, **options)

    async def main() -> list[int]:
        client.noticed.clear()
        monkeypatch.setattr(subprocess, "Popen", popen)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await client.noticed.wait()
        assert client._restart is not None
        await client._restart
        (answer,) = await collect(client.submit(ask(prompt(4), sampling=SHORT)))
        return answer.token_ids

    assert len(loop.run(main())) == SHORT.max_tokens
    assert len(refused) == 1


def test_an_engine_whose_adapters_do_not_come_back_is_not_left_beside_the_next(
    client: Watched, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
):
    """Whatever it was that failed: the disk, say, or a fault of ours."""
    monkeypatch.setattr(engine_client, "FIRST_RESTART_DELAY", 0.01)
    pids: list[int | None] = []

    async def main() -> None:
        async def bring_back() -> None:
            pids.append(client.pid)
            if len(pids) < 3:
                raise (OSError("the disk"), ValueError("a fault"))[len(pids) - 1]

        client.on_restart = bring_back
        assert client.pid is not None
        client.noticed.clear()
        os.kill(client.pid, signal.SIGKILL)
        await client.noticed.wait()
        assert client._restart is not None
        await client._restart
        assert client.ready and client.pid == pids[2] and len(set(pids)) == 3

    loop.run(patiently(main()))
    for pid in pids[:2]:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_thread_that_dies_ends_the_process() -> None:
    """It would go on to say that it lives, while nobody loads adapters or reads what it is told."""

    class Broken:
        def activate_adapter(self, key: AdapterKey) -> None:
            raise SystemError

        class host:
            @staticmethod
            def drop(key: AdapterKey) -> None:
                raise MemoryError

    inbox: process._Inbox = queue.SimpleQueue()
    loads: process._Loads = queue.SimpleQueue()
    loads.put(UnloadAdapter(TUCKA))
    process._load(Broken(), loads, inbox)  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        process._handle(Broken(), None, inbox.get_nowait())  # type: ignore[arg-type]
