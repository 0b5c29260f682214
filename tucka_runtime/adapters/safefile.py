"""Reading a safetensors file that nobody vouches for.

Layout: 8 bytes header length N (little-endian), N bytes JSON `{name: {dtype, shape, data_offsets}}`, then the tensors'
bytes without gaps. The header is checked whole before any tensor is read, so memory is bounded by the caller's check of
the shapes, not by what the file claims. Stricter than the safetensors library, which takes duplicate names and files of
any header size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from tucka_runtime.adapters.files import WEIGHTS_NAME, read_exactly, read_into, strict_json
from tucka_runtime.errors import InvalidAdapterError

if TYPE_CHECKING:
    import hashlib

MAX_HEADER_BYTES = 2**20  # an entry takes about 150 bytes: enough for both LoRA matrices of 3,500 linears
MAX_DIMS = 8
PIECE_BYTES = 2**25  # read at once: what reading takes beside the tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor of the header. It lies at [begin, end) bytes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: BufferedIOBase, size: int, digest: "hashlib._Hash") -> dict[str, Entry]:
    """The entries of a safetensors file of `size` bytes, in the order they lie in it; feeds what it reads to `digest`.

    Raises InvalidAdapterError.
    """
    prefix = read_exactly(file, min(size, 8), WEIGHTS_NAME)
    length = int.from_bytes(prefix, "little")
    if size < 8 or length > size - 8:
        raise _invalid("it is shorter than its header says. Copy it again")
    if length > MAX_HEADER_BYTES:
        raise _invalid(f"its header is larger than {MAX_HEADER_BYTES} bytes")
    header = read_exactly(file, length, WEIGHTS_NAME)
    digest.update(prefix + header)
    try:
        table = strict_json(header)
    except ValueError as error:
        raise _invalid(f"its header is malformed: {error}") from None
    if not isinstance(table, dict):
        raise _invalid("its header is not a JSON object")
    _check_metadata(table.pop("__metadata__", None))
    entries = sorted(((name, _entry(value)) for name, value in table.items()), key=lambda e: (e[1].begin, e[1].end))
    position = 0
    for _, entry in entries:
        if entry.begin != position:
            raise _invalid("its tensors overlap or leave holes")
        position = entry.end
    if position != size - 8 - length:
        raise _invalid("its tensors do not fill it exactly: it is truncated or has trailing bytes")
    return dict(entries)


def read_tensors(
    file: BufferedIOBase, entries: Mapping[str, Entry], out: torch.Tensor, digest: "hashlib._Hash"
) -> dict[str, torch.Tensor]:
    """The tensors behind a header just read, or the next ones of them, one behind the other in `out`, which has as many
    numbers and may be of another type; feeds their bytes to `digest`. Raises InvalidAdapterError if the file is cut off
    meanwhile.

    Many small ones are read and hashed at once, and large ones in pieces.
    """
    begin = 0
    for dtype, bytes_ in _runs(entries):
        count = bytes_ // dtype.itemsize
        for part in out[begin : begin + count].split(PIECE_BYTES // dtype.itemsize):
            piece = part if dtype == out.dtype else torch.empty(len(part), dtype=dtype)
            data: memoryview = piece.view(torch.uint8).numpy().data
            read_into(file, data, WEIGHTS_NAME)
            digest.update(data)
            if piece is not part:
                part.copy_(piece)
        begin += count
    parts = out.split([math.prod(entry.shape) for entry in entries.values()])
    return {name: part.view(entry.shape) for part, (name, entry) in zip(parts, entries.items(), strict=True)}


def _runs(entries: Mapping[str, Entry]) -> list[tuple[torch.dtype, int]]:
    """The types in which the tensors lie one behind the other, and the bytes of each run of one."""
    runs = groupby(entries.values(), lambda entry: entry.dtype)
    return [(dtype, sum(entry.end - entry.begin for entry in run)) for dtype, run in runs]


def _entry(value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid("an entry of its header does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _invalid(f"a tensor's dtype is not one of {', '.join(DTYPES)}. Save the adapter in one of them")
    if _naturals(shape) and 0 in shape:
        raise _invalid(
            "a tensor is empty (its shape has a 0). DeepSpeed's ZeRO-3 leaves it so: save "
            "with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the checkpoint"
        )
    if not _naturals(shape) or not 0 < len(shape) <= MAX_DIMS:
        raise _invalid(f"a tensor's shape is not 1 to {MAX_DIMS} positive integers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _invalid("a tensor's data_offsets are not two natural numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _invalid("a tensor's data_offsets do not agree with its shape and dtype")
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_metadata(metadata: Any) -> None:
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _invalid("its __metadata__ is not an object of strings")


def _invalid(reason: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"the adapter's {WEIGHTS_NAME} cannot be used: {reason}.")
