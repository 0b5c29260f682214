"""What happens, while it happens: one line on stderr, rewritten in place on a terminal."""

import asyncio
import math
import sys
from typing import TextIO

from tucka_runtime.loadtest.report.metrics import Latency
from tucka_runtime.loadtest.runner import Run


class RunProgress:
    """`async with RunProgress(run, title)`: a line every second on a terminal, every ten elsewhere."""

    def __init__(self, run: Run, title: str, quiet: bool, stream: TextIO = sys.stderr) -> None:
        self.run, self.title, self.quiet, self.stream = run, title, quiet, stream
        self.seen = self.failed = 0
        self.last = 0.0

    async def __aenter__(self) -> "RunProgress":
        self.task = asyncio.create_task(self.show())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.task.cancel()
        if not self.quiet and self.stream.isatty():
            self.stream.write("\r\033[K")

    async def show(self) -> None:
        terminal = self.stream.isatty()
        while not self.quiet:
            await asyncio.sleep(1 if terminal else 10)
            line = self.line()
            self.stream.write(f"\r\033[K{line}" if terminal else line + "\n")
            self.stream.flush()

    def line(self) -> str:
        """Tokens per second and TTFT are of the requests that ended since the last line."""
        clock, span = self.run.client.clock(), self.run.settings.span
        fresh = self.run.result.finished[self.seen :]
        answered = [r for r in fresh if r.ok]
        self.seen += len(fresh)
        self.failed += len(fresh) - len(answered)
        rate = sum(r.output_tokens or len(r.events) for r in answered) / max(clock - self.last, 1e-9)
        self.last = clock
        ttft = sorted(Latency(r).ttft for r in answered)
        middle = f"{ttft[len(ttft) // 2] * 1000:.0f} ms" if ttft else "-"
        changes = f" | {len(self.run.churn.events)} adapter calls" if self.run.churn.events else ""
        return (
            f"{self.title} {clock:.0f}{f'/{span:.0f}' if math.isfinite(span) else ''} s"
            f" | {self.run.client.running.total()} running, {self.seen - self.failed} done, {self.failed} failed"
            f" | {rate:.0f} tok/s, TTFT {middle}{changes}"
        )
