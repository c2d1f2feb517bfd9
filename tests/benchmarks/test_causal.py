from __future__ import annotations

import torch
from causal import INTERVENTIONS, at, disturbed, later, velocity_change
from torch import Tensor

from liquid_diffusion.models.liquid import ParallelCfC
from liquid_diffusion.models.unet import LiquidUNet


def trained_like() -> LiquidUNet:
    """A small model whose every part is used."""
    model = LiquidUNet(12, 3, widths=(32, 64), depths=(1, 1), ratio=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def test_gates_see_another_time_and_the_rest_does_not() -> None:
    model, labels = trained_like(), torch.tensor([0, 3])
    x, t = torch.randn(2, 12, 8, 8), torch.tensor([0.3, 0.6])
    layer = next(m for m in model.modules() if isinstance(m, ParallelCfC))
    seen: dict[str, Tensor] = {}

    def look(module: ParallelCfC, arguments: tuple[Tensor, Tensor]) -> None:
        condition = arguments[1]
        seen["condition"] = condition
        seen["gate"] = torch.cat(module.slope_and_offset(condition), 1)[:, :, 0, 0]
        seen["alpha"] = module.alpha(condition)

    handle = layer.register_forward_pre_hook(look)
    plain = model(x, t, labels).sample
    true = dict(seen)
    with disturbed(model, gate=later(0.1)):
        changed = model(x, t, labels).sample
    torch.testing.assert_close(seen["condition"], true["condition"])
    torch.testing.assert_close(seen["alpha"], true["alpha"])
    other = model.condition(t + 0.1, labels)
    torch.testing.assert_close(seen["gate"], torch.cat(layer.slope_and_offset(other), 1)[:, :, 0, 0])
    assert (changed - plain).abs().max() > 1e-5

    with disturbed(model, alpha="frozen"):
        model(x, t, labels)
        frozen = seen["alpha"]
        model(x, 1 - t, labels)
    torch.testing.assert_close(seen["alpha"], frozen)  # no time in it
    grid = [layer.alpha(model.condition(torch.full((2,), s / 20), labels)) for s in range(21)]
    torch.testing.assert_close(frozen, torch.stack(grid).mean(0), atol=1e-5, rtol=1e-5)
    with disturbed(model, alpha=at(0.5)):
        model(x, t, labels)
    torch.testing.assert_close(seen["alpha"], layer.alpha(model.condition(torch.full((2,), 0.5), labels)))
    handle.remove()
    torch.testing.assert_close(model(x, t, labels).sample, plain, atol=0, rtol=0)  # all is as it was


def test_change_is_none_where_nothing_is_disturbed() -> None:
    model, x0, labels = trained_like(), torch.randn(6, 12, 8, 8), torch.arange(6) % 3
    changes = {name: velocity_change(model, x0, labels, what) for name, what in INTERVENTIONS.items()}
    assert changes.pop("none") == 0
    assert min(changes.values()) > 1e-5
    assert velocity_change(model, x0, labels, {"gate": later(0.0)}) < 1e-6
