"""JSON as it goes out."""

import json
from typing import Any

import msgspec
from starlette.responses import JSONResponse

# Where clients split lines that are none to JSON, as Python's `splitlines` does; the other such characters are control
# characters, which JSON escapes anyway.
_SEPARATORS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}

_text_encoder = msgspec.json.Encoder()


def encode_json(value: Any) -> bytes:
    """One line in UTF-8, whoever splits it. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_SEPARATORS).encode() if not text.isascii() else text.encode()


def encode_text(text: str) -> bytes:
    """A string as `encode_json` writes it, in a tenth of the time."""
    encoded = _text_encoder.encode(text)
    return encoded if text.isascii() else encoded.decode().translate(_SEPARATORS).encode()


class JSONAnswer(JSONResponse):
    """Every JSON answer that is not streamed."""

    def render(self, content: Any) -> bytes:
        return encode_json(content)
