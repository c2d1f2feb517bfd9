"""The blocks of a model compiled for training, where the machine can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._dynamo.exc import TorchDynamoException

from liquid_diffusion.errors import first_line
from liquid_diffusion.models.unet import LiquidUNet


def compile_blocks(model: LiquidUNet, try_step: Callable[[], None], one_shape: bool) -> str | None:
    """Compile the blocks; where that can't be done, leave them as they are.

    Args:
        model: whose blocks are compiled in place.
        try_step: forward and backward on a batch of the size to come, which shows whether it can be done.
        one_shape: whether all batches have that size: blocks of another width are then compiled for themselves, on
            two cores in 17 s where one for any width and size took 49.

    Returns:
        None, or why they are not compiled.
    """
    torch.compiler.reset()  # the shapes of a run before, in this process, count against the limit of 8
    # shapes beyond the limit are computed as they are
    model.compile_repeated_blocks(dynamic=False if one_shape else None)
    try:
        try_step()
    except TorchDynamoException as error:
        for module in model.modules():
            module._compiled_call_impl = None
        return first_line(error)
    return None
