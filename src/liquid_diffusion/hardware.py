"""What the machine at hand can do."""

from __future__ import annotations

import ctypes
import os
import platform
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from liquid_diffusion.errors import UserError

# glibc's <malloc.h>: from how many free bytes on the heap's end is given back, -1 for never; how many blocks may have a
# mapping of their own, which is given back with them
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Of processes for each other: one that has encoded its part waits for the slowest. One that died is noticed by the
# launcher, whatever this says.
_PATIENCE = timedelta(hours=12)


def process_state() -> PartialState:
    """This process's device, and its place among others if it was launched with them.

    accelerate looks for other processes without an accelerator only if it is told that the CPU is meant.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def _cpu_is_fast_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: by AMX tiles, or by the dot products of AVX512_BF16.

    By the latter (two cores of a Zen 4, benchmarks/results/precision.csv) tiny is sampled 1.6 times as fast.
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype to compute in on a device: bfloat16 on a CPU or GPU that multiplies it natively, float16 on an older
    GPU, float32 elsewhere."""
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_is_fast_in_bfloat16() else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def choose_precision(wanted: str, device: torch.device) -> str:
    """accelerate's name, "no", "bf16" or "fp16", of the arithmetic that `wanted` means on this machine.

    "auto" is `fastest_dtype`.

    Raises:
        UserError: fp16 is wanted on a CPU, where it is slow and has no loss scaling.
    """
    if wanted == "auto":
        return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[fastest_dtype(device)]
    if wanted == "fp32":
        return "no"
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU; on a CPU take --precision bf16 or fp32.")
    return wanted


def at_most_cores(processes: int) -> int:
    """That number of processes, or one for each core that this process may use where that is fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(processes, cores)


def free_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA card that this process may still take or has taken already; None for other devices."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def keep_freed_memory() -> None:
    """Let what computes on the CPU use its freed memory again instead of giving it back to the kernel each step.

    Activations of some megabytes are else mapped, cleared and unmapped over and over, with thousands of page faults a
    step. What is free in between may not fit the next block: up to twice of what is in use can stay with the process.
    It counts for the whole process: what takes one over, a command or a training, calls it. Linux with glibc
    only; elsewhere nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
