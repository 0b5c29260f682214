"""The tokenizers of adapters that add tokens to their base's (`--adapter-defaults`)."""

import asyncio
import json
import logging
import os
from collections import OrderedDict
from pathlib import Path

from tucka_runtime.adapters.files import TOKENIZER_NAME
from tucka_runtime.added_tokens import ExtendedTokenizer, NewToken
from tucka_runtime.children import python
from tucka_runtime.errors import InvalidAdapterError, TuckaError
from tucka_runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_KNOWN = 1024
"""Files whose tokenizers stay in memory: those used last."""
WAIT_SECONDS = 120  # of the clock, for a process that gets no processor


class OwnTokenizers:
    """Adapters with the same tokenizer.json share one tokenizer, and the base's where it adds nothing. Files are read
    one at a time, in a process each (adapters/tokenizer_file.py)."""

    def __init__(self, base: Tokenizer):
        self._base = base
        self._question = b""
        self._known: OrderedDict[str, Tokenizer] = OrderedDict()
        self._lock = asyncio.Lock()

    async def of(self, folder: Path, digest: str) -> Tokenizer:
        """The tokenizer of the file in a folder, which has that SHA-256. Raises InvalidAdapterError for what cannot be
        used, TuckaError where it cannot be read."""
        if digest not in self._known:
            async with self._lock:
                if digest not in self._known:
                    self._known[digest] = await self._read(folder, digest)
        self._known.move_to_end(digest)
        found = self._known[digest]
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return found

    async def _read(self, folder: Path, digest: str) -> Tokenizer:
        if not self._question:
            self._question = await asyncio.to_thread(_question, self._base)
        child = await asyncio.create_subprocess_exec(
            *python("-m", "tucka_runtime.adapters.tokenizer_file", str(os.getpid()), str(folder), digest),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to answer
        )
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                written, _ = await child.communicate(self._question)
        except TimeoutError:
            raise TuckaError(
                f"The server could not read the adapter's {TOKENIZER_NAME}: its process for that does not end. Try "
                "again when the machine has less to do."
            ) from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode:
            log.error("the process that reads an adapter's %s ended with status %s", TOKENIZER_NAME, child.returncode)
            raise InvalidAdapterError(
                f"the adapter's {TOKENIZER_NAME} takes more time or memory to read than any may take. Save it again, "
                "or take the file out of the folder."
            )
        answer = json.loads(written)
        if "error" in answer:
            raise InvalidAdapterError(answer["error"])
        tokens = [NewToken(*token) for token in answer["tokens"]]
        return await asyncio.to_thread(ExtendedTokenizer, self._base, tokens) if tokens else self._base


def _question(base: Tokenizer) -> bytes:
    """The base's tokens, as the process wants them."""
    about = {"vocabulary": base.vocabulary, "added": sorted(base.added_ids)}
    return json.dumps(about, ensure_ascii=False).encode()
