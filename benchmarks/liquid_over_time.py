"""What a trained model's liquid layers do over the diffusion time, block by block: figures for docs/liquid-block.md.

    python benchmarks/liquid_over_time.py RUN        (RUN left out: the packaged model)

Alpha depends on time and label alone and is computed as it is. The gate depends on what the layer sees, so it is taken
on noised pictures that the model drew itself, which needs no data set.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import torch
from figures import OVER_TIME, draw_over_time
from torch import Tensor

from liquid_diffusion.flow import interpolate
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.models.layers import channel_norm
from liquid_diffusion.models.liquid import LiquidBlock, ParallelCfC
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import seeded_generators

mpl.use("agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parent.parent / "docs" / "images"
PICTURES = 18
PERCENTILES = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])


def named_blocks(model: LiquidUNet) -> Iterator[tuple[str, LiquidBlock]]:
    """The blocks in the order in which they compute, with their stage and how much smaller the picture is there."""
    last = len(model.encoder) - 1
    stages = [(f"encoder, 1/{2**i}", stage) for i, stage in enumerate(model.encoder)]
    stages.append((f"bottleneck, 1/{2**last}", model.bottleneck))
    stages += [(f"decoder, 1/{2 ** (last - i)}", stage) for i, stage in enumerate(model.decoder)]
    for name, stage in stages:
        blocks = list(stage.children())
        for number, block in enumerate(blocks, start=1):
            assert isinstance(block, LiquidBlock)
            yield name + (f" ({number})" if len(blocks) > 1 else ""), block


@torch.no_grad()
def curves(pipeline: LiquidDiffusionPipeline, times: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each block alpha and gate of each channel, (times, channels) each.

    The gate of a channel is its mean over the pixels of `PICTURES` pictures.
    """
    model = pipeline.unet.eval().float()
    labels = pipeline.labels(None, PICTURES)
    x0 = pipeline(
        PICTURES, None if labels is None else labels.tolist(), generator=seeded_generators(0, PICTURES),
        output_type="latent",
    ).images  # fmt: skip
    noise = pipeline.noise(PICTURES, seeded_generators(1000, PICTURES))
    blocks = list(named_blocks(model))
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name, _ in blocks}

    def look(name: str, layer: ParallelCfC, x: Tensor, condition: Tensor) -> None:
        alphas, gates = seen[name]
        alphas.append(layer.alpha(condition).mean(0))
        a, b = layer.slope_and_offset(condition)
        f = layer.heads(a * channel_norm(x) + b).chunk(2, dim=1)[0]
        gates.append(torch.sigmoid(f).mean((0, 2, 3)))

    hooks = [
        block.cfc.register_forward_pre_hook(lambda layer, inputs, name=name: look(name, layer, *inputs))
        for name, block in blocks
    ]
    for t in times:
        at = t.expand(PICTURES)
        model(interpolate(x0, noise, at), at, labels)
    for hook in hooks:
        hook.remove()
    return {name: (torch.stack(alphas), torch.stack(gates)) for name, (alphas, gates) in seen.items()}


def draw(panels: dict[str, Tensor], times: Tensor, symbol: str, path: Path) -> None:
    """A panel for each block: median over channels, and where the middle half and the middle 80 % of them lie."""
    columns = 4
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(10, 2.3 * rows + 0.5), sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (name, values) in zip(axes.flat, panels.items(), strict=False):
        low, lower, middle, upper, high = torch.quantile(values, PERCENTILES, dim=1).numpy()
        ax.fill_between(times, low, high, color="#0d9488", alpha=0.18, linewidth=0, label="80 % of the channels")
        ax.fill_between(times, lower, upper, color="#0d9488", alpha=0.32, linewidth=0, label="half of them")
        ax.plot(times, middle, color="#115e59", label="median")
        ax.set_title(name, fontsize=10)
        ax.set_ylim(0, 1)
        ax.set_xlim(0, 1)
        ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("t (0 data, 1 noise)")
    for row in axes:
        row[0].set_ylabel(symbol)
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_table(found: dict[str, tuple[Tensor, Tensor]]) -> None:
    """What the panels show as a row for each, and the table of the page.

    Over the channels of a block: the tenth, the median and the last tenth of their means over t, and the median of what
    lies between a channel's least and greatest value over t, and of what it gains from t = 0 to t = 1.
    """
    rows = []
    for block, panels in found.items():
        for symbol, values in zip(("alpha", "gate"), panels, strict=True):  # (times, channels)
            low, middle, high = torch.quantile(values.mean(0), torch.tensor([0.1, 0.5, 0.9])).tolist()
            moves = (values.amax(0) - values.amin(0)).median().item()
            gains = (values[-1] - values[0]).median().item()
            facts = {"low": low, "median": middle, "high": high, "moves": moves, "gains": gains}
            rows.append({"block": block, "what": symbol} | {name: f"{value:.3f}" for name, value in facts.items()})
    with OVER_TIME.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_over_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder, pipeline folder or Hub id (default: the packaged model)")
    parser.add_argument("--out", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.run)
    pipeline.set_progress_bar_config(disable=True)
    times = torch.linspace(0, 1, 41)
    found = curves(pipeline, times)
    draw({name: alpha for name, (alpha, _) in found.items()}, times, "alpha", arguments.out / "liquid-alpha.png")
    draw({name: gate for name, (_, gate) in found.items()}, times, "gate", arguments.out / "liquid-gate.png")
    if arguments.run is None:  # of which docs/liquid-block.md tells
        write_table(found)


if __name__ == "__main__":
    main()
