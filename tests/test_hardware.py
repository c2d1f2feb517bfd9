from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from liquid_diffusion.config import UserError
from liquid_diffusion.hardware import choose_precision

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(("amx", "expected"), [(True, "bf16"), (False, "no")])
def test_cpu(monkeypatch: pytest.MonkeyPatch, amx: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision("auto", CPU) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_cuda(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_precision("auto", CUDA) == expected


def test_what_was_said_counts() -> None:
    assert choose_precision("auto", MPS) == "no"
    assert choose_precision("fp32", CUDA) == "no"
    assert choose_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept() -> None:
    """Page faults of five blocks of 20 MB that are taken and freed over and over, in a process of their own."""
    script = """
import resource, sys, torch
from liquid_diffusion.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for i in range(12):
    if i == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(5 * 2**20) for _ in range(5)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, plain = (
        int(subprocess.run([sys.executable, "-c", script, mode], check=True, capture_output=True, text=True).stdout)
        for mode in ("keep", "plain")
    )
    assert kept < 0.05 * plain
