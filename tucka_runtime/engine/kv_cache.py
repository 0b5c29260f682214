"""The KV cache: how many tokens there is memory for, and the tensors that hold their keys and values."""

import contextlib
import logging
import math
import mmap

import torch
from torch import Tensor

from tucka_runtime import machine
from tucka_runtime.config import EngineConfig
from tucka_runtime.errors import ModelLoadError
from tucka_runtime.kernels.tables.blocks import SCALE_BYTES, slot_bytes, with_scales
from tucka_runtime.models.architecture import Architecture

logger = logging.getLogger(__name__)

# Of what this process may still take: the rest is for activations, adapters and other processes.
CPU_MEMORY_SHARE = 0.25
# Of what is free once the weights are loaded. The rest is for activations, graphs and adapters, of which 256 for all
# seven linears of a Llama-3-8B at r 16 take 21.5 GB: engine/memory.py refuses what does not fit.
GPU_MEMORY_SHARE = 0.85

HUGE_PAGE = 2 << 20


def cache_dtype(config: EngineConfig, arch: Architecture, weights: torch.dtype) -> torch.dtype:
    """The type of the caches. Raises ModelLoadError where the model's heads cannot be kept in the one asked for."""
    if config.kv_cache_dtype == "auto":
        return weights
    if arch.head_dim % SCALE_BYTES:
        raise ModelLoadError(
            f"An int8 KV cache keeps heads of a multiple of {SCALE_BYTES} numbers; this model's have {arch.head_dim}. "
            "Leave --kv-cache-dtype at auto."
        )
    return torch.int8


def _slot_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """Of the keys of one token in one layer."""
    if dtype == torch.int8:
        return slot_bytes(arch.kv_heads, arch.head_dim)
    return arch.kv_heads * arch.head_dim * dtype.itemsize


def count_blocks(
    config: EngineConfig, arch: Architecture, max_len: int, dtype: torch.dtype, device: torch.device
) -> int:
    """The blocks of `config.block_size` tokens that the cache has: as many as asked for, else what memory allows. Is
    asked once the weights are loaded. Raises ModelLoadError if not even one sequence of `max_len` fits."""
    token_bytes = 2 * arch.num_layers * _slot_bytes(arch, dtype)
    wanted = config.kv_cache_tokens
    if wanted is None:
        # More than every sequence at full length can never be used.
        wanted = min(int(_room(device) / token_bytes), config.max_num_seqs * (max_len + config.block_size))
    if wanted < max_len:
        raise ModelLoadError(
            f"The KV cache holds {wanted} tokens, fewer than one sequence of {max_len} needs. "
            "Lower --max-model-len, or raise --kv-cache-tokens."
        )
    return -(-wanted // config.block_size)


def _room(device: torch.device) -> float:
    """Bytes for the cache."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * GPU_MEMORY_SHARE
    memory = machine.memory()
    logger.info("memory: %.1f GiB left by %s", memory.available / 2**30, memory.limited_by)
    return memory.available * CPU_MEMORY_SHARE


def make_caches(
    arch: Architecture, slots: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (slots, KV heads, D), an int8 cache's with their scales behind them."""

    def cache() -> Tensor:
        if dtype == torch.int8:
            whole = _zeros((slots, slot_bytes(arch.kv_heads, arch.head_dim)), dtype, device)
            return with_scales(whole, arch.kv_heads, arch.head_dim)
        return _zeros((slots, arch.kv_heads, arch.head_dim), dtype, device)

    return [(cache(), cache()) for _ in range(arch.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU in huge pages, where Linux gives them. Of the 4 KiB pages of an allocator a decode step reads some
    thousands, in the order of its sequences' blocks: with 8 sequences of 1,900 tokens, heads of 64 and two threads,
    attention takes 0.91 to 0.95 of the time over 4 KV heads and 0.97 to 1.00 over 8 (medians of 40 turns)."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    # What is not written has no memory yet, and it must not run out of it in traffic.
    return whole[begin : begin + size].view(dtype).view(shape).zero_()
