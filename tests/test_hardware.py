from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liquid_diffusion.errors import UserError
from liquid_diffusion.hardware import at_most_cores, choose_precision, fastest_dtype

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "expected"), [(True, True, "bf16"), (False, True, "bf16"), (False, False, "no")]
)
def test_cpu(monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert choose_precision("auto", CPU) == expected


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no other source of what the processor can do")
def test_bfloat16_follows_the_processor() -> None:
    """The kernel's list of the processor's instructions, which torch does not read."""
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    if not flags:
        pytest.skip("a processor that lists no flags")
    fast = bool({"amx_bf16", "avx512_bf16"} & set(flags.split()))
    assert fastest_dtype(CPU) == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_cuda(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_precision("auto", CUDA) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are not bound to cores here")
def test_no_more_processes_than_cores() -> None:
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert [at_most_cores(wanted) for wanted in (0, 1, 2)] == [0, 1, 1]
    finally:
        os.sched_setaffinity(0, cores)


def test_what_was_said_counts() -> None:
    assert choose_precision("auto", MPS) == "no"
    assert choose_precision("fp32", CUDA) == "no"
    assert choose_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept() -> None:
    """Five blocks of 40 MB: what of them has mappings of its own, and what the heap keeps afterwards.

    By the allocator's own books: page faults and resident memory are not counted alike on every kernel.
    """
    script = """
import ctypes, json, sys, torch
from liquid_diffusion.hardware import keep_freed_memory
class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
if sys.argv[1] == "keep":
    keep_freed_memory()
before = libc.mallinfo2()
blocks = [torch.ones(10 * 2**20) for _ in range(5)]
mapped = libc.mallinfo2().hblkhd - before.hblkhd
del blocks
print(json.dumps([mapped, libc.mallinfo2().fordblks - before.fordblks]))
"""
    results = (
        subprocess.run([sys.executable, "-c", script, mode], check=True, capture_output=True, text=True).stdout
        for mode in ("keep", "plain")
    )
    (mapped, stays), (mapped_plainly, stays_plainly) = map(json.loads, results)
    assert mapped < 1e6
    assert stays > 180e6
    assert mapped_plainly > 200e6
    assert stays_plainly < 10e6
