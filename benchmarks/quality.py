"""Quality of our model beside its peers and its own variants, all trained under one budget; and the figures of it.

    python benchmarks/quality.py --split tune --seconds 480         # choose learning rates, on a split of train
    python benchmarks/quality.py --seconds 480 --seeds 0 1 2        # then measure on val, equal wall-clock
    python benchmarks/quality.py --images 100000 --seeds 0 1 2      # or equal images
    python benchmarks/quality.py --models ablations --seconds 480 --seeds 0 1 2
    python benchmarks/quality.py --measure 30   # step times, taken in turns, for --clock table
    python benchmarks/quality.py --draw                             # only tables and plots, from the CSV

Each training appends its points to benchmarks/results/quality.csv when it is whole; one that is there already is left
out, so the same command goes on after an interruption. Sampling and evaluation are not counted. All models get the
same data, codec, flow, optimiser, average and sampler (Heun, 25 steps, no guidance), and each its best of three
learning rates.

By the clock "table" equal time is a number of steps for each model, by step times that were taken in turns in one run:
what a busy neighbour does to one turn it does to all models, and trainings of different hours can be compared. Another
processor has other step times, and may have a table of its own (`--table AMX`), by which one can train anywhere.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from ablations import ABLATIONS, ablated
from figures import CHOSEN_FOR, QUALITY, STEP_TIMES, best_learning_rate, draw_quality, read_rows
from harness import Budget, Training, draw, fit_codec, held_out_loss, predict
from peers import check_size, dico, dit, fcdm, unet2d
from speed import machine, take_turns
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from liquid_diffusion.codecs import PixelCodec
from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.sources import open_source
from liquid_diffusion.evaluation.features import extract, make_features
from liquid_diffusion.evaluation.metrics import compare
from liquid_diffusion.evaluation.reference import CachedFeatures, labels_of
from liquid_diffusion.hardware import keep_freed_memory
from liquid_diffusion.models.unet import LiquidUNet

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LEARNING_RATES = {"adamw": (5e-4, 1e-3, 2e-3), "muon": (4e-3, 8e-3, 16e-3)}  # to choose from, by optimiser
FRACTIONS = (0.25, 0.5, 1.0)
STEPS = 25  # of Heun's solver, for all samples
TUNE_SHARE = 10  # one in this many code points of train is held out to choose learning rates on

# commit; what makes a training the one it is; where it was measured; what was found (nothing but losses where it served
# to choose a learning rate)
COLUMNS = [
    *("commit", "device", "threads", "split", "size", "preset", "model", "seed", "budget", "clock", "lr", "optimizer"),
    *("time_shift", "parameters", "flops", "fraction", "steps", "images", "seconds", "loss", "held_out_loss"),
    *("kd", "kd_standard_error", "fd", "precision", "recall", "fd_pictures"),
]
STEP_TIME_COLUMNS = [
    *("commit", "machine", "threads", "size", "preset", "model", "optimizer"),
    *("median_ms", "least_ms", "most_ms", "runs", "scale"),
]
OURS = "liquid"
PEERS: dict[str, Callable[[str, int, int, int], nn.Module]] = {
    OURS: lambda preset, channels, classes, _: LiquidUNet.from_preset(preset, channels, classes),
    "plain": lambda preset, channels, classes, _: ablated("plain", preset, channels, classes),
    "DiCo block": lambda preset, channels, classes, _: dico(preset, channels, classes),
    "FCDM block": lambda preset, channels, classes, _: fcdm(preset, channels, classes),
    "UNet2DModel": unet2d,
    "UNet2DModel, no attention": lambda *shape: unet2d(*shape, attention=False),
    "DiTTransformer2DModel": dit,
}


def build(name: str, preset: str, channels: int, classes: int, side: int) -> nn.Module:
    """The peer or variant called `name`, of equal parameters."""
    model = PEERS[name](preset, channels, classes, side) if name in PEERS else ablated(name, preset, channels, classes)
    check_size(model, LiquidUNet.from_preset(preset, channels, classes).num_parameters())
    return model


def pictures(folder: Path, size: int, split: str) -> tuple[PictureDataset, PictureDataset]:
    """Pictures to train on and to compare with: train and val, or, for choices, two parts of train.

    Like val itself, the part held out for choices has whole code points, in all their styles.
    """
    train = open_source(str(folder / "emoji64x3-train.parquet"), label_column="label")
    if split == "val":
        val = open_source(str(folder / "emoji64x3-val.parquet"), label_column="label")
        return PictureDataset(train, size), PictureDataset(val, size)
    points = pyarrow.parquet.read_table(folder / "emoji64x3-train.parquet", columns=["codepoints"])["codepoints"]
    held = [hashlib.blake2b(p.encode()).digest()[0] % TUNE_SHARE == 0 for p in points.to_pylist()]
    return (
        PictureDataset(train, size, indices=[i for i, out in enumerate(held) if not out]),
        PictureDataset(train, size, indices=[i for i, out in enumerate(held) if out]),
    )


@torch.compiler.set_stance("force_eager")  # what is compiled is not counted
def forward_flops(model: nn.Module, channels: int, side: int, device: torch.device) -> int:
    """Multiplications and additions of one picture's evaluation, as torch counts them."""
    x, t = torch.zeros(1, channels, side, side, device=device), torch.zeros(1, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(model.eval(), x, t, torch.zeros(1, dtype=torch.long, device=device))
    return int(counter.get_total_flops())


class Comparison:
    """Trainings under one budget, each written to the CSV when it is whole."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(options.threads or torch.get_num_threads())
        self.train, self.reference = pictures(options.data, options.size, options.split)
        self.codec = fit_codec(PixelCodec(2), self.train)
        self.draws = not options.measure and (options.split == "val" or options.chosen_rates)
        if self.draws:
            self.extractor = make_features("lite0", self.device)
            self.real = CachedFeatures(self.extractor, self.device).of(self.reference)
            self.labels = labels_of(self.reference)

    def budget(self, name: str) -> Budget:
        """What a model may spend."""
        options = self.options
        if options.images is not None:
            return Budget(options.images, "images", options.clock)
        return Budget(
            options.seconds, "s", options.clock, step_seconds(name, options) if options.clock == "table" else 0.0
        )

    def build(self, name: str) -> nn.Module:
        """A model for these pictures, on the device."""
        side, classes = self.options.size // self.codec.factor, len(self.train.label_names)
        model = build(name, self.options.preset, self.codec.channels, classes, side)
        return model.to(self.device, memory_format=torch.preserve_format if "DiT" in name else torch.channels_last)

    def training(self, name: str, seed: int, lr: float) -> Training:
        """One that has not begun; its seed is that of the weights too."""
        torch.manual_seed(seed)
        model = self.build(name)
        ablation = ABLATIONS[name if name in ABLATIONS else OURS]
        shift = ablation.time_shift * self.options.time_shift
        how = (lr, seed, ablation.times, shift, self.options.optimizer)
        return Training(model, self.train, self.codec, *how)

    def measure(self, names: list[str], runs: int) -> None:
        """Take training steps of all these models in turns, and append a row to step-time.csv for each that has none.

        Those that have one say how much slower this hour is than the one of the table, which the new rows are
        divided by (their median where they differ).
        """
        torch._dynamo.config.recompile_limit = 8 * len(names)  # models that share a block's code share its limit
        trainings = {name: self.training(name, 0, LEARNING_RATES[self.options.optimizer][0]) for name in names}
        for training in trainings.values():
            training.model.train()
            training.warm_up()
        times = take_turns({name: training.step for name, training in trainings.items()}, runs, self.device)
        rows, known = [], {name: step_times(name, self.options) for name in names}
        slower = [statistics.median(times[name]) / float(had[-1]["median_ms"]) for name, had in known.items() if had]
        scale = 1 / statistics.median(slower) if slower else 1.0
        for name, some in times.items():
            if known[name]:
                continue
            middle, least, most = (scale * value for value in (statistics.median(some), min(some), max(some)))
            facts = {key: getattr(self.options, key) for key in ("size", "preset", "optimizer")}
            found = {"median_ms": middle, "least_ms": least, "most_ms": most, "runs": runs, "scale": scale}
            threads = {"machine": machine(self.device), "threads": self._threads()}
            rows.append({"model": name, **facts, **found, **threads})
            print(f"{name}: {middle:.1f} ms a step ({least:.1f} to {most:.1f})", flush=True)
        append_rows(step_time_table(self.options), STEP_TIME_COLUMNS, rows)

    def _threads(self) -> int | str:
        return torch.get_num_threads() if self.device.type == "cpu" else ""

    def _facts(self, name: str, seed: int, lr: float, budget: Budget) -> dict[str, Any]:
        """What makes a training the one it is."""
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine(),
            "threads": self._threads(),
            "split": self.options.split,
            "size": self.options.size,
            "preset": self.options.preset,
            "model": name,
            "seed": seed,
            "budget": str(budget),
            "clock": clock_of(self.options),
            "lr": lr,
            "optimizer": self.options.optimizer,
            "time_shift": f"{self.options.time_shift:g}",
        }

    def run(self, name: str, seed: int, lr: float) -> None:
        budget = self.budget(name)
        facts = self._facts(name, seed, lr, budget)
        done = [row for row in read_rows(QUALITY) if all(row[key] == str(value) for key, value in facts.items())]
        if any(row["kd"] or not self.draws for row in done):
            print(f"{name}, seed {seed}, lr {lr:g}: is there already", flush=True)
            return
        training = self.training(name, seed, lr)
        model, side = training.model, self.options.size // self.codec.factor
        facts |= {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops": forward_flops(model, self.codec.channels, side, self.device),
        }
        rows = []
        for point in training.points(budget, self.options.fractions):
            found = {"held_out_loss": held_out_loss(model, self.codec, self.reference)}
            said = f"loss {point.loss:.3f}, held out {found['held_out_loss']:.4f}"
            if self.draws:
                samples = draw(model, self.codec, self.labels, self.options.size, STEPS)
                found |= compare(self.real, extract(self.extractor, samples.split(32), self.device))
                said += f", KD {found['kd']:.4f} +- {found['kd_standard_error']:.4f}"
            rows.append(facts | vars(point) | found)
            print(f"{name}, seed {seed}, lr {lr:g}: step {point.steps}, {point.seconds:.0f} s, {said}", flush=True)
        append_rows(QUALITY, COLUMNS, rows)


def append_rows(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV of the results, each with the commit it was measured at."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            rounded = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({"commit": commit.stdout.strip(), **rounded})


def clock_of(options: argparse.Namespace) -> str:
    """The clock, with the name of its table where that is not the usual one."""
    return f"table {options.table}" if options.clock == "table" and options.table else options.clock


def step_time_table(options: argparse.Namespace) -> Path:
    return STEP_TIMES.with_name(f"step-time-{options.table}.csv") if options.table else STEP_TIMES


def step_times(name: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """The rows of a model in the table of step times under these options, oldest first: of any CPU, or of this GPU."""
    wanted = {"model": name} | {key: str(getattr(options, key)) for key in ("size", "preset", "optimizer")}
    if torch.cuda.is_available():
        wanted["machine"] = torch.cuda.get_device_name()
    rows = [
        row for row in read_rows(step_time_table(options)) if all(row[key] == value for key, value in wanted.items())
    ]
    return rows if torch.cuda.is_available() else [row for row in rows if row["threads"]]


def step_seconds(name: str, options: argparse.Namespace) -> float:
    """What a step of a model takes by the newest of its rows."""
    found = step_times(name, options)
    if not found:
        sys.exit(f"Nobody has measured a step of {name}: run with --measure first.")
    return float(found[-1]["median_ms"]) / 1000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["peers"], help="names, or peers, or ablations (all of them)")
    parser.add_argument("--preset", default="nano", help="whose parameters all models have")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures")
    parser.add_argument("--seconds", type=float, default=480, help="equal seconds of training steps")
    parser.add_argument("--images", type=int, help="equal images in place of equal seconds")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu", "table"),
        default="wall",
        help="table: the measured step times; see --measure",
    )
    parser.add_argument("--table", metavar="NAME", help="of step times: results/step-time-NAME.csv, not step-time.csv")
    parser.add_argument("--measure", type=int, metavar="RUNS", help="train nothing; take that many steps in turns")
    parser.add_argument("--split", choices=("val", "tune"), default="val", help="tune: choose learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, help="one for all, in place of the best of `--split tune`")
    parser.add_argument(
        "--chosen-rates", action="store_true", help="with `--split tune`: rates are chosen, something else is not"
    )
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="of all models")
    parser.add_argument("--time-shift", type=float, default=1.0, help="of the training times of all models")
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=list(FRACTIONS), help="of the budget, evaluated at"
    )
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of emoji64x3-train.parquet and -val.parquet")
    parser.add_argument("--draw", action="store_true", help="only draw what the CSV holds")
    options = parser.parse_args()
    groups = {"peers": list(PEERS), "ablations": list(ABLATIONS)}
    options.models = list(dict.fromkeys(name for given in options.models for name in groups.get(given, [given])))
    options.fractions = sorted({*options.fractions, 1.0})
    unknown = [name for name in options.models if name not in PEERS and name not in ABLATIONS]
    if unknown:
        parser.error(f"there is no model {unknown[0]!r}; choose from {', '.join([*PEERS, *ABLATIONS])}")
    if not options.draw and not (options.data / "emoji64x3-train.parquet").is_file():
        parser.error(f"there is no emoji64x3-train.parquet in {options.data}; say --data")
    return options


def plan(options: argparse.Namespace) -> list[tuple[str, int, float]]:
    """Model, seed and learning rate of each training. A variant of ours that was not tuned itself takes our rate."""
    trainings, rows = [], read_rows(QUALITY)
    for seed in options.seeds:
        for name in options.models:
            best = best_learning_rate(rows, name, {key: str(getattr(options, key)) for key in CHOSEN_FOR})
            if options.lr:
                rates: tuple[float, ...] = (options.lr,)
            elif options.split == "tune" and not options.chosen_rates:
                rates = LEARNING_RATES[options.optimizer]
            elif best is not None:
                rates = (float(best),)
            else:
                sys.exit(f"No learning rate was chosen for {name}: run with --split tune first, or say --lr.")
            trainings += [(name, seed, lr) for lr in rates]
    return trainings


def main() -> None:
    options = parse()
    if options.measure and all(step_times(name, options) for name in options.models):
        print("All of them are measured already: other figures would give the seeds to come other steps.")
        return
    if options.measure:
        Comparison(options).measure(options.models, options.measure)
        return
    if not options.draw:
        trainings = plan(options)
        comparison = Comparison(options)
        for training in trainings:
            comparison.run(*training)
    draw_quality()


if __name__ == "__main__":
    main()
