from __future__ import annotations

import pytest
import torch

from liquid_diffusion.config import UserError
from liquid_diffusion.training.hardware import choose_precision, keep_freed_memory

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


def test_freed_memory_is_kept() -> None:
    """Page faults of a block that is taken and freed over and over stop after the first time."""
    import resource

    keep_freed_memory()
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20 * 2**20 // 4)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(faults[1:]) < 200  # 5,120 pages were touched each time
