"""Where along the path from noise to a picture our model and the DiT differ, after equally many images.

    python benchmarks/along_the_path.py --seeds 0 1 2

Both are trained as quality.py trains them, and measured on its split for choices: the flow's loss at each of some
times, and the kernel distance of pictures that one model draws down to a time and the other from there on. A seed that
is in benchmarks/results/along-the-path.csv already is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from figures import CHOSEN_FOR, PATH, QUALITY, best_learning_rate, draw_path, read_rows
from harness import draw, predict
from quality import DATA, OURS, STEPS, Comparison, append_rows
from torch import Tensor, nn

from liquid_diffusion.data.pictures import collate
from liquid_diffusion.data.transforms import to_float
from liquid_diffusion.evaluation.features import extract
from liquid_diffusion.evaluation.metrics import kernel_distance
from liquid_diffusion.flow import flow_loss, interpolate, velocity

THEIRS = "DiTTransformer2DModel"
TIMES = (0.05, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.98)
HANDED_OVER = 0.9
COLUMNS = ["commit", "threads", "images", "seed", "model", "lr", "time", "loss", "kd", "kd_standard_error"]


class HandedOver(nn.Module):
    """One model's velocity above a time, another's below it.

    Args:
        first, then: called as model(x, t, labels).
        at: the time in [0, 1].
    """

    def __init__(self, first: nn.Module, then: nn.Module, at: float) -> None:
        super().__init__()
        self.first, self.then, self.at = first, then, at

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x (B, C, H, W), and t (B,), the same for all."""
        return predict(self.first if float(t[0]) > self.at else self.then, x, t, labels)


@torch.compiler.set_stance("force_eager")  # else it would be compiled again for evaluation
@torch.no_grad()
def loss_at(model: nn.Module, x0: Tensor, labels: Tensor, time: float) -> float:
    """The flow's loss at one time, over latents x0 (N, C, h, w) with the same noise for every model."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    t = torch.full((len(x0),), time, device=x0.device)
    x = interpolate(x0, noise, t)
    parts = zip(x.split(64), t.split(64), labels.split(64), strict=True)
    predicted = torch.cat([predict(model, *part).float() for part in parts])
    return flow_loss(predicted, velocity(x0, noise)).item()


class Paths:
    """The two models of one seed after another, trained, measured, and written to the CSV."""

    def __init__(self, options: argparse.Namespace) -> None:
        shared = {"split": "tune", "size": 32, "preset": "nano", "clock": "cpu", "measure": None, "chosen_rates": True}
        shared |= {"optimizer": "muon", "time_shift": 1.0, "fractions": [1.0]}
        self.options = argparse.Namespace(**shared, images=options.images, threads=options.threads, data=options.data)
        self.comparison = Comparison(self.options)
        images, labels, _ = collate([self.comparison.reference.picture(i) for i in range(len(self.comparison.labels))])
        self.x0 = self.comparison.codec.encode(to_float(images.to(self.comparison.device)))
        self.labels = labels.to(self.comparison.device)

    def run(self, seed: int) -> None:
        """Train both from a seed, and append the rows."""
        comparison, models, rows = self.comparison, {}, []
        shared = {"threads": self.options.threads, "images": self.options.images, "seed": seed}
        for name in (OURS, THEIRS):
            rate = best_learning_rate(
                read_rows(QUALITY), name, {key: str(getattr(self.options, key)) for key in CHOSEN_FOR}
            )
            if rate is None:
                raise SystemExit(f"No learning rate was chosen for {name}: run quality.py with --split tune first.")
            training = comparison.training(name, seed, float(rate))
            for _ in training.points(comparison.budget(name), self.options.fractions):
                for time in TIMES:
                    found = {"time": time, "loss": loss_at(training.model, self.x0, self.labels, time)}
                    rows.append({**shared, "model": name, "lr": rate, **found})
                models[name] = self._kept(name, training.model)  # whose weights are the averages only here
        ours, theirs = models[OURS], models[THEIRS]
        cases = {
            OURS: ours,
            THEIRS: theirs,
            f"{THEIRS}, then {OURS}": HandedOver(theirs, ours, HANDED_OVER),
            f"{OURS}, then {THEIRS}": HandedOver(ours, theirs, HANDED_OVER),
        }
        for name, model in cases.items():
            rows.append({**shared, "model": name, **self._distance(model)})
            print(rows[-1], flush=True)
        append_rows(PATH, COLUMNS, rows)

    def _kept(self, name: str, model: nn.Module) -> nn.Module:
        """A copy of a trained model, not compiled."""
        kept = self.comparison.build(name).eval()
        kept.load_state_dict(model.state_dict())
        return kept

    def _distance(self, model: nn.Module) -> dict[str, Any]:
        comparison = self.comparison
        samples = draw(model, comparison.codec, comparison.labels, self.options.size, STEPS)
        found = kernel_distance(comparison.real, extract(comparison.extractor, samples.split(32), comparison.device))
        return {"kd": found.value, "kd_standard_error": found.standard_error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=32000, help="that each is trained on")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of emoji64x3-train.parquet")
    options = parser.parse_args()
    done = {int(row["seed"]) for row in read_rows(PATH) if int(row["images"]) == options.images}
    if missing := [seed for seed in options.seeds if seed not in done]:
        paths = Paths(options)
        for seed in missing:
            paths.run(seed)
    draw_path()


if __name__ == "__main__":
    main()
