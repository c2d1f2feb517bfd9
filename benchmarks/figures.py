"""Tables and plots of the documentation, made from the CSV files in benchmarks/results and from nothing else.

    python benchmarks/figures.py

A table stands in docs/ablations.md between two comments with its name, and is written there anew.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
QUALITY = RESULTS / "quality.csv"
STEP_TIMES = RESULTS / "step-time.csv"
CAUSAL = RESULTS / "causal.csv"
OVER_TIME = RESULTS / "liquid-over-time.csv"
PATH = RESULTS / "along-the-path.csv"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "ablations.md"
FORMER = {  # by the words before the names of the tables: where the rows of a model of before are, and its page
    "without positions": (
        RESULTS / "former" / "quality-without-positions.csv",
        DOCUMENT.with_name("ablations-without-positions.md"),
    ),
    "pooling gate": (RESULTS / "former" / "quality-pooling-gate.csv", DOCUMENT.with_name("ablations-pooling-gate.md")),
    "former": (RESULTS / "former" / "quality.csv", DOCUMENT.with_name("ablations-before.md")),
}
NOT_YET = "*Not run yet.*"

SETTING = (
    "budget",
    "clock",
    "size",
    "preset",
    "device",
    "threads",
    "optimizer",
    "time_shift",
)  # only what has these in common is compared
CHOSEN_FOR = ("size", "preset", "optimizer")  # what a learning rate was chosen for
_CLEAR = 2  # standard errors; less is called no difference
_SEEDS = 3  # at least, for a claim

PEERS = (
    "liquid",
    "plain",
    "DiCo block",
    "FCDM block",
    "UNet2DModel",
    "UNet2DModel, no attention",
    "DiTTransformer2DModel",
)

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """All rows of a CSV; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def of_any_clock(rows: list[Row]) -> list[Row]:
    """Rows without the clock where the budget is of images: what a second is changes nothing there."""
    return [row | {"clock": ""} if row["budget"].endswith("images") else row for row in rows]


def _is_variant(model: str) -> bool:
    """Of our block, itself included; *plain* is shown among the peers too."""
    return model in ("liquid", "plain") or model not in PEERS


def best_learning_rate(rows: list[Row], model: str, setting: Mapping[str, str]) -> str | None:
    """The one of the least loss in training on the split for choices; `liquid`'s for a variant that was not tuned.

    By the loss and not by the kernel distance, which is still flat where trainings for choices end.
    """
    for name in (model, "liquid") if _is_variant(model) else (model,):
        wanted = {"split": "tune", "model": name, "fraction": "1"} | {key: setting[key] for key in CHOSEN_FOR}
        tuned = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
        if tuned:  # losses of one budget are compared: of the longest that several rates were tried under
            budgets = list(_group(tuned, "budget", "time_shift").values())
            several = [some for some in budgets if len(_group(some, "lr")) > 1] or budgets
            tuned = max(several, key=lambda some: float(some[0]["budget"].split()[0]))
            return min(tuned, key=lambda row: float(row["loss"]))["lr"]
    return None


def mean_and_error(rows: list[Row], key: str = "kd") -> tuple[float, float]:
    """Mean over trainings and its standard error.

    That is the larger of two: what the seeds tell, and what the pictures of each figure alone leave open. Three seeds
    may lie together by chance.
    """
    values = [float(row[key]) for row in rows]
    error = statistics.mean(float(row[f"{key}_standard_error"]) for row in rows) / math.sqrt(len(values))
    if len(values) > 1:
        error = max(error, statistics.stdev(values) / math.sqrt(len(values)))
    return statistics.mean(values), error


def verdict(rows: list[Row], base: list[Row]) -> str:
    """How a model's kernel distance differs from the base's, in words."""
    (value, error), (other, other_error) = mean_and_error(rows), mean_and_error(base)
    both = math.hypot(error, other_error)
    seeds = min(len(rows), len(base))
    if seeds < _SEEDS:
        return f"no claim, {seeds} seed{'s' if seeds > 1 else ''}"
    if abs(value - other) < _CLEAR * both:
        return "none"
    return f"{'better' if value < other else 'worse'}, {abs(value - other) / both:.1f} standard errors"


def _group(rows: list[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return dict(groups)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _setting(row: Row) -> str:
    threads = f", {row['threads']} thread{'s' if row['threads'] != '1' else ''}" if row["threads"] else ""
    kind, _, table = row["clock"].partition(" ")  # a table of step times may have a name
    words = {"cpu": " of the processor's time", "table": " by the table of step times"}
    clock = words.get(kind, "") + (f" ({table})" if table else "")
    budget = f"{row['budget']}{clock}" if row["budget"].endswith(" s") else row["budget"]
    muon = ", all by Muon" if row["optimizer"] == "muon" else ""
    times = "" if float(row["time_shift"]) == 1 else f", training times shifted by {row['time_shift']}"
    return f"{budget} each, {row['size']} px, size of {row['preset']}, {row['device']}{threads}{muon}{times}"


def _order(models: dict[tuple[str, ...], list[Row]]) -> list[tuple[str, ...]]:
    return sorted(models, key=lambda key: mean_and_error(models[key])[0])


def comparison_tables(rows: list[Row], base: str, columns: dict[str, str] | None = None) -> str:
    """A table for each budget and machine: the models in it by their kernel distance on val.

    Args:
        rows: of the models to be shown.
        base: the model that differences are told from.
        columns: a text for each model, in a column of its own.
    """
    final = [row for row in rows if row["split"] == "val" and float(row["fraction"]) == 1]
    tables = []
    for setting in _group(final, *SETTING).values():
        models = _group(setting, "model")
        if len(models) < 2 or (base,) not in models:
            continue
        lines = []
        for key in _order(models):
            some = models[key]
            value, error = mean_and_error(some)
            other = mean_and_error(models[base,])[0]
            names = ("held_out_loss", "fd", "precision", "recall", "steps", "seconds")
            average = {name: statistics.mean(float(row[name]) for row in some) for name in names}
            lines.append(
                [
                    f"**{key[0]}**" if key == (base,) else key[0],
                    *([columns[key[0]]] if columns else []),
                    f"{value:.3f} ± {error:.3f}",
                    f"{other / value:.2f}",
                    "" if key == (base,) else verdict(some, models[base,]),
                    f"{average['held_out_loss']:.4f}",
                    f"{average['fd']:.0f}",
                    f"{average['precision']:.2f} / {average['recall']:.2f}",
                    f"{float(some[0]['parameters']) / 1e6:.2f} M",
                    f"{float(some[0]['flops']) / 1e6:.0f} M",
                    f"{average['steps']:.0f}",
                    f"{1000 * average['seconds'] / average['steps']:.0f}",
                    some[0]["lr"],
                    str(len(some)),
                ]
            )
        header = ["model", *(["what it tests"] if columns else []), "KD", f"{base} / it", f"difference from {base}"]
        header += ["loss on val", "FD", "precision / recall", "parameters", "FLOPs", "steps", "ms a step"]
        header += ["lr", "seeds"]
        tables.append(f"{_setting(setting[0])}:\n\n{markdown(header, lines)}")
    return "\n\n".join(tables) or NOT_YET


def optimizer_table(rows: list[Row]) -> str:
    """The models that were trained under one budget by AdamW and by Muon, and how they differ."""
    final = [row for row in rows if row["split"] == "val" and float(row["fraction"]) == 1]
    same = [name for name in SETTING if name != "optimizer"]
    tables = []
    for setting in _group(final, *same).values():
        lines = []
        for (model,), some in _group(setting, "model").items():
            by = {key: chosen for (key,), chosen in _group(some, "optimizer").items()}
            for name, words in (("adamw", "AdamW"), ("muon", "Muon")) if len(by) == 2 else ():
                value, error = mean_and_error(by[name])
                loss = statistics.mean(float(row["held_out_loss"]) for row in by[name])
                step = statistics.mean(1000 * float(row["seconds"]) / float(row["steps"]) for row in by[name])
                difference = "" if name == "adamw" else verdict(by[name], by["adamw"])
                cells = [f"{value:.3f} ± {error:.3f}", difference, f"{loss:.4f}", f"{step:.0f}", str(len(by[name]))]
                lines.append([model, words, *cells])
        if lines:
            header = ["model", "by", "KD", "difference from AdamW", "loss on val", "ms a step", "seeds"]
            tables.append(f"{_setting({**setting[0], 'optimizer': ''})}:\n\n{markdown(header, lines)}")
    return "\n\n".join(tables) or NOT_YET


def tuning_table(rows: list[Row]) -> str:
    """Loss at the end of the trainings for choices, for each learning rate."""
    times = [row for some in _times_tried(rows) for row in some]
    final = [row for row in rows if row["split"] == "tune" and float(row["fraction"]) == 1 and row not in times]
    tables = []
    for setting in _group(final, *SETTING).values():
        rates = sorted({row["lr"] for row in setting}, key=float)
        lines = []
        for (model,), some in _group(setting, "model").items():
            found = {row["lr"]: float(row["loss"]) for row in some}
            best = min(found, key=lambda lr: found[lr])
            cells = [
                f"**{found[lr]:.3f}**" if lr == best else f"{found[lr]:.3f}" if lr in found else "" for lr in rates
            ]
            lines.append([model, *cells])
        tables.append(f"{_setting(setting[0])}:\n\n{markdown(['model', *rates], lines)}")
    return "\n\n".join(tables) or NOT_YET


def _times_tried(rows: list[Row]) -> list[list[Row]]:
    """Trainings for choices that differ by their training times, together; those whose pictures were measured."""
    final = [row for row in rows if row["split"] == "tune" and float(row["fraction"]) == 1 and row["kd"]]
    settings = _group(final, *(name for name in SETTING if name != "time_shift")).values()
    return [some for some in settings if len(_group(some, "time_shift")) > 1]


def times_table(rows: list[Row]) -> str:
    """Kernel distance on the split for choices, for each shift of the training times that was tried."""
    tables = []
    for setting in _times_tried(rows):
        shifts = sorted({row["time_shift"] for row in setting}, key=float)
        lines = []
        for (model,), some in _group(setting, "model").items():
            found = {shift: mean_and_error(tried) for (shift,), tried in _group(some, "time_shift").items()}
            best = min(found, key=lambda shift: found[shift][0])
            cells = {shift: f"{value:.3f} ± {error:.3f}" for shift, (value, error) in found.items()}
            cells[best] = f"**{cells[best]}**"
            lines.append([model, *(cells.get(shift, "") for shift in shifts)])
        header = ["model", *(f"shift {shift}" for shift in shifts)]
        tables.append(f"{_setting({**setting[0], 'time_shift': '1'})}:\n\n{markdown(header, lines)}")
    return "\n\n".join(tables) or NOT_YET


def causal_table(rows: list[Row]) -> str:
    """What breaks when the liquid parts of a trained model are disturbed."""
    if not rows:
        return NOT_YET
    steps = sorted({row["steps"] for row in rows}, key=int)
    lines = []
    for (name,), some in _group(rows, "intervention").items():
        found = {row["steps"]: f"{float(row['kd']):.3f} ± {float(row['kd_standard_error']):.3f}" for row in some}
        lines.append([name, f"{float(some[0]['velocity_change']):.1%}", *(found.get(count, "") for count in steps)])
    table = markdown(["what is done", "change of the velocity", *(f"KD, {count} steps" for count in steps)], lines)
    first = rows[0]
    what = f"{first['run']}, {first['n']} samples against {first['held_out']} held-out pictures"
    return f"{what}, Euler unless another solver is named:\n\n{table}"


def path_tables(rows: list[Row]) -> dict[str, str]:
    """Losses at single times, and distances of pictures that one model begins and another one ends."""
    if not rows:
        return {"losses along the path": NOT_YET, "pictures handed over": NOT_YET}
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    what = f"{first['images']} images each, {seeds} seed{'s' if seeds > 1 else ''}"
    losses, drawn = [row for row in rows if row["time"]], [row for row in rows if row["kd"]]
    times = sorted({row["time"] for row in losses}, key=float)
    found = {key: [float(row["loss"]) for row in some] for key, some in _group(losses, "model", "time").items()}
    least = {time: min(statistics.mean(some) for (_, at), some in found.items() if at == time) for time in times}
    lines = []
    for (model,) in _group(losses, "model"):
        means = {time: statistics.mean(found[model, time]) for time in times}
        lines.append([model, *(f"**{m:.3f}**" if m == least[time] else f"{m:.3f}" for time, m in means.items())])
    distances = [(*mean_and_error(some), model) for (model,), some in _group(drawn, "model").items()]
    ordered = [[model, f"{value:.3f} ± {error:.3f}"] for value, error, model in sorted(distances)]
    return {
        "losses along the path": f"{what}:\n\n{markdown(['loss at', *times], lines)}",
        "pictures handed over": f"{what}:\n\n{markdown(['drawn by', 'KD'], ordered)}",
    }


def write_tables(tables: dict[str, str], document: Path = DOCUMENT) -> None:
    """Put each table between its two comments.

    Raises:
        ValueError: the document has no place for one.
    """
    text = document.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not place.search(text):
            raise ValueError(f"{document} has no place for the table {name!r}")
        text = place.sub(lambda _, table=table, begin=begin, end=end: f"{begin}\n{table}\n{end}", text)
    document.write_text(text)


def _pyplot():
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _save(figure, axes, name: str, x: str, y: str) -> None:
    """benchmarks/results/NAME.png, with the legend beside the curves."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(RESULTS / f"{name}.png", dpi=130, bbox_inches="tight")
    _pyplot().close(figure)


def plot_curves(rows: list[Row], name: str, x: str, words: str) -> None:
    """benchmarks/results/NAME.png: kernel distance along each training, mean over seeds, against a column."""
    from matplotlib.ticker import LogLocator

    figure, axes = _pyplot().subplots(figsize=(8.5, 4.5))
    models = _group(rows, "model")
    last = {
        key: mean_and_error([row for row in some if float(row["fraction"]) == 1])[0] for key, some in models.items()
    }
    for key in sorted(models, key=lambda key: last[key]):
        points = sorted(_group(models[key], "fraction").values(), key=lambda some: float(some[0]["fraction"]))
        places = [statistics.mean(float(row[x]) for row in some) for some in points]
        values, errors = zip(*(mean_and_error(some) for some in points), strict=True)
        look = {"color": f"C{PEERS.index(key[0])}", "linewidth": 3 if key[0] == "liquid" else 1.5}  # in all plots alike
        label = f"{key[0]}, {values[-1]:.3f}"
        axes.errorbar(places, values, errors, fmt="o-", capsize=2, markersize=4, label=label, **look)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))  # above 1 there may be none else
    axes.yaxis.set_minor_formatter("{x:.2g}")
    _save(figure, axes, name, words, "kernel distance to val (less is better)")


def draw_quality() -> None:
    """All that quality.csv tells: tables in docs/ablations.md, and curves."""
    from ablations import ABLATIONS

    rows = of_any_clock(_at_chosen_rates(read_rows(QUALITY)))
    tables = _quality_tables(rows, {name: ablation.question for name, ablation in ABLATIONS.items()})
    tables["training times"] = times_table(rows)
    write_tables(_with_curves(tables, rows, "quality"))


def _with_curves(tables: dict[str, str], rows: list[Row], stem: str) -> dict[str, str]:
    """The tables, under those of peers the curves of either budget's setting with most rows, if it has any."""
    found = dict(tables)
    for name, unit, x, words in (
        ("time", " s", "seconds", "seconds of training steps"),
        ("images", "images", "images", "images seen"),
    ):
        some = [row for row in rows if row["model"] in PEERS and row["budget"].endswith(unit) and row["split"] == "val"]
        setting = max(_group(some, *SETTING).values(), key=len, default=[])
        if any(float(row["fraction"]) < 1 for row in setting):  # else each training is a point
            plot_curves(setting, f"{stem}-{name}", x, words)
            found[f"peers at equal {name}"] += _picture(f"{stem}-{name}", f"Kernel distance against {words}")
    return found


def _at_chosen_rates(rows: list[Row]) -> list[Row]:
    """Without trainings at a learning rate that was not chosen; all of a model for which none was."""
    return [
        row
        for row in rows
        if row["split"] == "tune" or best_learning_rate(rows, row["model"], row) in (row["lr"], None)
    ]


def _quality_tables(rows: list[Row], questions: dict[str, str] | None = None) -> dict[str, str]:
    """Tables of rows of `quality.py`, by their names; with what each variant tests, or without."""
    peers = [row for row in rows if row["model"] in PEERS]
    settings = _group([row for row in rows if _is_variant(row["model"])], *SETTING).values()
    # a setting with models alone that stand beside the peers already has nothing to add
    variants = [row for some in settings if any(row["model"] not in PEERS for row in some) for row in some]
    return {
        "learning rates": tuning_table(rows),
        "ablations": comparison_tables(variants, "liquid", questions),
        "peers at equal time": comparison_tables([row for row in peers if row["budget"].endswith(" s")], "liquid"),
        "peers at equal images": comparison_tables(
            [row for row in peers if row["budget"].endswith("images")], "liquid"
        ),
    }


def _picture(name: str, words: str) -> str:
    return f"\n\n![{words}](../benchmarks/results/{name}.png)"


def draw_causal() -> None:
    """The table of the causal tests, and the kernel distance against the number of steps."""
    rows = read_rows(CAUSAL)
    picture = _picture("causal", "Kernel distance against the number of steps") if rows else ""
    write_tables({"causal tests": causal_table(rows) + picture})
    if not rows:
        return
    figure, axes = _pyplot().subplots(figsize=(8.5, 4.5))
    for (name,), some in _group(rows, "intervention").items():
        steps = [int(row["steps"]) for row in some]
        values, errors = [float(row["kd"]) for row in some], [float(row["kd_standard_error"]) for row in some]
        words = name.replace("none", "as it is")
        axes.plot(steps, values, "o-", markersize=4, label=words, linewidth=3 if name == "none" else 1.5)
        if name == "none":  # the others' are as wide, and of the same seeds
            axes.errorbar(steps, values, errors, fmt="none", capsize=2)
            axes.set_xscale("log")
            axes.set_xticks(steps, [str(count) for count in steps])
            axes.set_xticks([], minor=True)
    _save(figure, axes, "causal", "steps", "kernel distance to held-out pictures (less is better)")


def draw_over_time() -> None:
    """The table of what a trained model's liquid layers do over the time."""
    lines = []
    for (block,), some in _group(read_rows(OVER_TIME), "block").items():
        cells = []
        for row in some:  # alpha, gate
            low, middle, high, moves, gains = (float(row[name]) for name in ("low", "median", "high", "moves", "gains"))
            cells += [f"{low:.2f}, **{middle:.2f}**, {high:.2f}", f"{moves:.2f}", f"{gains:+.2f}"]
        lines.append([block, *cells])
    table = markdown(["block", "alpha", "moves", "gains", "gate", "moves", "gains"], lines)
    write_tables({"liquid over time": table}, DOCUMENT.with_name("liquid-block.md"))


def draw_path() -> None:
    """The tables of what the models do along the path."""
    write_tables(path_tables(read_rows(PATH)))


def main() -> None:
    draw_quality()
    for words, (path, document) in FORMER.items():
        rows = _at_chosen_rates(read_rows(path))
        tables = _with_curves(_quality_tables(rows), rows, f"quality-{words.replace(' ', '-')}")
        if (optimisers := optimizer_table(rows)) != NOT_YET:
            tables["optimisers"] = optimisers
        write_tables({f"{words} {name}": table for name, table in tables.items()}, document)
    draw_causal()
    draw_path()
    draw_over_time()


if __name__ == "__main__":
    main()
