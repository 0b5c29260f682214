"""A batch before a fake engine: in the tests' process, or in one of its own that can be killed.

python -m tests.support.batch_runs IN OUT SECONDS_PER_TOKEN
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.support import GOLDEN
from tests.support.fake_engine import FakeEngine
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.config import ServerConfig
from tucka_runtime.server.batch import FileBatch
from tucka_runtime.server.batch_file import AnswerFile, read_items
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.adapters import AdapterNames
from tucka_runtime.server.service.service import Service
from tucka_runtime.tokenizer import Tokenizer


async def answer_all(source: Path, target: Path, engine: FakeEngine) -> FileBatch:
    """What `tucka batch` does once the engine is there."""
    metrics = Metrics()
    with tempfile.TemporaryDirectory() as state:
        registry = AdapterRegistry(Path(state))
        adapters = AdapterNames(engine, registry, "base", metrics)  # type: ignore[arg-type]
        adapters.ready = True
        tokenizer = Tokenizer.load(GOLDEN / "bases" / "llama-tiny")
        service = Service(ServerConfig(), "base", engine, tokenizer, None, adapters, metrics)  # type: ignore[arg-type]
        output = AnswerFile(target)
        made = FileBatch(service, output)
        left = [item for item in read_items(source) if item.id not in output.done]
        try:
            await made.answer_all(iter(left), len(left))
        finally:
            output.close()
            adapters.close()
            registry.close()
        return made


if __name__ == "__main__":
    slow = FakeEngine()
    slow.seconds_per_token = float(sys.argv[3])
    asyncio.run(answer_all(Path(sys.argv[1]), Path(sys.argv[2]), slow))
