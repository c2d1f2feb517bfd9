"""The learning rate over a run."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Warm-up, plateau, cosine: what the learning rate is multiplied by.

    Args:
        step: counted from 0.
        steps: of the whole run.
        warmup: steps of a linear rise from the first one on.
        cooldown: share of the steps, at the end, in which it falls to 0 as a cosine.

    Returns:
        In [0, 1].
    """
    rising = (step + 1) / warmup if step < warmup else 1.0
    start = steps * (1 - cooldown)
    if step < start:
        return rising
    return rising * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - start) / max(1.0, steps - start))))
