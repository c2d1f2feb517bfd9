"""Is the time in the liquid layers of a trained model used? Disturb it there alone, and measure what breaks.

    python benchmarks/causal.py                      # the model that comes with the package
    python benchmarks/causal.py runs/quickstart --n 1000 --steps 4 8 25 50 100

Interventions, each in the liquid layers alone; adaLN gets the true time always:
  none               the model as it is
  gate time + 0.1    slope and offset of the gate as at a time 0.1 later (and 0.1 earlier)
  gate time 0.5      slope and offset as at t = 0.5, always
  alpha frozen       the relaxation weight of each channel at its mean over the times
  alpha time 0.5     the relaxation weight as at t = 0.5, always
All are sampled by Euler; the model as it is by UniPC too, the package's default.
Kernel distances are those of samples to the pictures held out of the run. The change of the velocity is
``|v' - v| / |v|`` at held-out pictures with noise, over uniform times.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from figures import CAUSAL, draw_causal
from harness import draw
from torch import Tensor

from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.transforms import to_float
from liquid_diffusion.evaluation.evaluate import spread_labels
from liquid_diffusion.evaluation.features import extract, make_features
from liquid_diffusion.evaluation.metrics import kernel_distance
from liquid_diffusion.evaluation.reference import CachedFeatures, labels_of, pictures_of_run
from liquid_diffusion.flow import interpolate
from liquid_diffusion.loading import find_run, load_pipeline
from liquid_diffusion.models.liquid import ParallelCfC
from liquid_diffusion.models.unet import LiquidUNet

STEPS = (4, 8, 15, 25, 50, 100)
Shift = Callable[[Tensor], Tensor]


def at(t: float) -> Shift:
    return lambda times: torch.full_like(times, t)


def later(by: float) -> Shift:
    return lambda times: (times + by).clamp(0, 1)


@contextlib.contextmanager
def disturbed(model: LiquidUNet, gate: Shift | None = None, alpha: Shift | str | None = None) -> Iterator[None]:
    """Within it, gates and relaxation weights of the liquid layers see another time than the rest of the model.

    Args:
        model: the trained model.
        gate: the time that the gates see, as a function of the true one.
        alpha: the time that the relaxation weights see; "frozen" for their mean over 21 times.
    """
    hooks: list[Callable[[], None]] = []
    embed, current = model.condition.forward, {}

    def condition(t: Tensor, labels: Tensor | None = None) -> Tensor:
        for name, shift in (("gate", gate), ("alpha", alpha)):
            if callable(shift):
                current[name] = embed(shift(t), labels)
        if alpha == "frozen":
            grid = torch.linspace(0, 1, 21, device=t.device)
            current["grid"] = torch.stack([embed(at(float(s))(t), labels) for s in grid])  # (21, B, T)
        return embed(t, labels)

    model.condition.forward = condition  # type: ignore[method-assign]
    for layer in model.modules():
        if not isinstance(layer, ParallelCfC):
            continue
        true_gate, true_alpha = layer.slope_and_offset, layer.alpha
        if gate is not None:
            layer.slope_and_offset = lambda _, f=true_gate: f(current["gate"])
        if alpha == "frozen":
            layer.alpha = lambda _, f=true_alpha: torch.stack([f(c) for c in current["grid"]]).mean(0)
        elif alpha is not None:
            layer.alpha = lambda _, f=true_alpha: f(current["alpha"])
        hooks += [lambda layer=layer: [layer.__dict__.pop(name, None) for name in ("slope_and_offset", "alpha")]]
    try:
        yield
    finally:
        del model.condition.forward
        for undo in hooks:
            undo()


INTERVENTIONS: dict[str, dict[str, Shift | str]] = {
    "none": {},
    "gate time + 0.1": {"gate": later(0.1)},
    "gate time - 0.1": {"gate": later(-0.1)},
    "gate time 0.5": {"gate": at(0.5)},
    "alpha frozen": {"alpha": "frozen"},
    "alpha time 0.5": {"alpha": at(0.5)},
}


@torch.no_grad()
def velocity_change(model: LiquidUNet, x0: Tensor, labels: Tensor, intervention: dict[str, Shift | str]) -> float:
    """``|v' - v| / |v|`` over latents x0 (N, C, h, w) at times spread over [0, 1]."""
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(x0.shape, generator=draws).to(x0)
    t = torch.linspace(0.02, 0.98, len(x0), device=x0.device)
    x = interpolate(x0, noise, t)
    v = model(x, t, labels).sample
    with disturbed(model, **intervention):
        changed = model(x, t, labels).sample
    return float((changed - v).norm() / v.norm())


def held_out(run: str, size: int) -> PictureDataset:
    known = pictures_of_run(run, size, size)
    if known is None or known.held_out is None:
        raise SystemExit(f"{run} does not say which pictures were held out of it.")
    return known.held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder (default: the packaged model)")
    parser.add_argument("--n", type=int, default=300, help="samples of each figure")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="of the solver")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(options.run).to(device)
    model, codec, size = pipeline.unet.eval(), pipeline.codec, pipeline.config["image_size"]
    if model.config["gate"] != "liquid" or model.config["relaxation"] != "liquid":
        raise SystemExit("The model has no liquid gate or no relaxation to be disturbed.")
    reference = held_out(find_run(options.run), size)
    extractor = make_features("lite0", device)
    real = CachedFeatures(extractor, device).of(reference)
    labels = spread_labels(labels_of(reference), options.n, 0)
    x0 = codec.encode(to_float(torch.stack([reference.picture(i)["image"] for i in range(len(reference))])).to(device))
    rows = []
    cases = [(name, intervention, "euler") for name, intervention in INTERVENTIONS.items()]
    for name, intervention, solver in [*cases, ("none, UniPC", INTERVENTIONS["none"], "unipc")]:
        change = velocity_change(model, x0, labels_of(reference).to(device), intervention)
        for steps in options.steps:
            with disturbed(model, **intervention):
                samples = draw(model, codec, labels, size, steps, solver)
            found = kernel_distance(real, extract(extractor, samples.split(32), device))
            rows.append(
                {
                    "run": Path(find_run(options.run)).name,
                    "intervention": name,
                    "steps": steps,
                    "n": options.n,
                    "held_out": len(reference),
                    "kd": f"{found.value:.6g}",
                    "kd_standard_error": f"{found.standard_error:.6g}",
                    "velocity_change": f"{change:.6g}",
                }
            )
            print(rows[-1], flush=True)
    with CAUSAL.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_causal()


if __name__ == "__main__":
    main()
