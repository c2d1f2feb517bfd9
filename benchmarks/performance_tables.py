"""The tables of docs/performance.md and docs/performance-amx.md, made from the CSV files in benchmarks/results and from
nothing else.

    python benchmarks/performance_tables.py

Of a case that was measured more than once the last row counts.
"""

from __future__ import annotations

from pathlib import Path

from figures import NOT_YET, RESULTS, Row, markdown, read_rows, write_tables
from speed import EACH, OURS, of_processor

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
AMX_DOCUMENT = DOCUMENT.with_name("performance-amx.md")
FORMER = RESULTS / "former"  # of the blocks before
Case = tuple[str, str, str, str]  # task, preset, batch, latent


def cases(rows: list[Row]) -> dict[Case, dict[str, Row]]:
    """The rows of each case by model."""
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        if row["batch"] != "1" or row["model"] != EACH:  # of one picture it is what ours is
            found.setdefault((row["task"], row["preset"], row["batch"], row["latent"]), {})[row["model"]] = row
    return found


def beside(found: dict[Case, dict[str, Row]], header: list[str], places: list[int]) -> str:
    """A line for each case: our milliseconds with their range, and those of others as multiples of ours.

    Args:
        header: of the columns that name a case.
        places: which parts of a case these columns show.
    """
    if not found:
        return NOT_YET
    others = list(dict.fromkeys(name for models in found.values() for name in models if name != OURS))
    lines = []
    for case, models in found.items():
        ours = models[OURS]
        line = [case[place] for place in places]
        line.append(f"{ours['median_ms']} ({ours['least_ms']} to {ours['most_ms']})")
        for name in others:
            ratio = float(models[name]["median_ms"]) / float(ours["median_ms"]) if name in models else 0
            line.append(f"{models[name]['median_ms']}, **{ratio:.1f} x**" if name in models else "")
        lines.append(line)
    return markdown([*header, f"{OURS}, ms", *others], lines)


def speed_tables(rows: list[Row]) -> dict[str, str]:
    """Times beside peers, of the rows of one processor."""
    found = cases(rows)

    def of(task: str, preset: str | None = None) -> dict[Case, dict[str, Row]]:
        return {case: models for case, models in found.items() if case[0] == task and preset in (None, case[1])}

    largest = {
        case: models
        for task in ("evaluation", "training step")
        for case, models in of(task).items()
        if case[2:] == ("8", "32")
    }
    in_float32 = of("evaluation in float32", "tiny") | of("training step in float32", "tiny")
    return {
        "evaluation": beside(of("evaluation", "tiny"), ["batch", "latent"], [2, 3]),
        "training step": beside(of("training step", "tiny"), ["batch", "latent"], [2, 3]),
        "all compiled": beside(of("training step, all compiled", "tiny"), ["batch", "latent"], [2, 3]),
        "presets": beside(largest, ["task", "preset"], [0, 1]),
        "float32": beside(in_float32, ["task", "batch", "latent"], [0, 2, 3]),
        "with decoder": beside(of("sampling with decoder", "tiny"), ["batch", "latent"], [2, 3]),
    }


def gpu_tables(rows: list[Row]) -> dict[str, str]:
    """Models as they ship, and all of them recorded alike."""
    gpu = cases([row for row in rows if row["machine"].startswith("NVIDIA")])
    alike = {case: gpu.pop(case) for case in list(gpu) if case[0].endswith("all compiled")}
    return {
        "gpu": beside(gpu, ["task", "batch", "latent"], [0, 2, 3]),
        "gpu, all alike": beside(alike, ["batch", "latent"], [2, 3]),
    }


def profile_table(rows: list[Row]) -> str:
    """Operators of a training step, the eager transcription's at the left, ours at the right."""
    if not rows:
        return NOT_YET
    sides = [[row for row in rows if (row["model"] == OURS) == ours] for ours in (False, True)]
    lines = [
        [cell for row in pair for cell in (f"`{row['operator']}`", row["ms"], row["calls"])]
        for pair in zip(*sides, strict=True)
    ]
    totals = [f"{sum(float(row['ms']) for row in side):.0f}" for side in sides]
    lines.append(["together", totals[0], "", "together", totals[1], ""])
    return markdown(["before: eager transcription", "ms", "calls", "after: LiquidUNet", "ms", "calls"], lines)


def roofline_table(rows: list[Row]) -> str:
    """What bounds a step: products, traffic, and what it took."""
    if not rows:
        return NOT_YET
    header = ["", "model", "latent", "GFLOP", "GB moved", "operators", "products alone, ms", "traffic alone, ms"]
    names = ["task", "model", "latent", "gflop", "gigabytes", "operators", "compute_ms", "memory_ms", "measured_ms"]
    return markdown([*header, "measured, ms"], [[row[name] for name in names] for row in rows])


def memory_table(rows: list[Row]) -> str:
    """A line for each preset and size, a column for each way to train."""
    ways = {
        "cached latents": ("True", "False"),
        "and gradient checkpointing": ("True", "True"),
        "pictures, encoded in each step": ("False", "False"),
    }
    peaks = {
        (row["model"], row["image_size"], row["cache_latents"], row["gradient_checkpointing"]): row["peak_gb"]
        for row in rows
    }
    lines = [
        [f"{model}, {size} px", *(peaks.get((model, size, *way), "not run yet") for way in ways.values())]
        for model, size in dict.fromkeys((row["model"], row["image_size"]) for row in rows)
    ]
    return markdown(["batch 8, bfloat16, GB", *ways], lines) if rows else NOT_YET


def beside_gpu_table(rows: list[Row]) -> str:
    """Estimate and measurement of trainings on a GPU, in the moments when they may take most."""
    moments = ("step", "grid", "encoding")

    def what(row: Row) -> str:
        ways = {"gradient_checkpointing": "gradient checkpointing", "ema_on_cpu": "averages on the CPU"}
        chosen = [words for name, words in ways.items() if row[name] == "True"]
        return ", ".join([row["model"], f"{row['image_size']} px", row["precision"], *chosen])

    def pair(row: Row, moment: str) -> str:
        measured, estimated = row[f"{moment}_measured"], row[f"{moment}_estimated"]
        return f"{measured}, {float(estimated) / float(measured) - 1:+.0%}" if measured else ""

    lines = [[what(row), *(pair(row, moment) for moment in moments)] for row in rows]
    return markdown(["batch 8, GB", *moments], lines) if rows else NOT_YET


def step_time_table(rows: list[Row]) -> str:
    """Training steps of benchmarks/quality.py on a GPU, all compiled and recorded."""
    rows = [row for row in rows if row["machine"].startswith("NVIDIA")]
    if not rows:
        return NOT_YET
    ours = next(float(row["median_ms"]) for row in rows if row["model"] == "liquid")
    lines = [
        [
            row["model"],
            f"{float(row['median_ms']):.1f} ({float(row['least_ms']):.1f} to {float(row['most_ms']):.1f})",
            f"**{float(row['median_ms']) / ours:.2f} x**",
        ]
        for row in rows
    ]
    return markdown(["model", "training step, ms", "beside ours"], lines)


def precision_table(rows: list[Row]) -> str:
    """float32 beside bfloat16, a line for each machine and computation."""
    lines = [
        [
            row["machine"],
            row["what"],
            row["float32_ms"],
            row["bfloat16_ms"],
            f"**{float(row['float32_ms']) / float(row['bfloat16_ms']):.1f} x** "
            f"({float(row['least_ratio']):.1f} to {float(row['most_ratio']):.1f})",
        ]
        for row in rows
    ]
    return markdown(["machine", "", "float32, ms", "bfloat16, ms", "gain"], lines) if rows else NOT_YET


def convolution_table(rows: list[Row]) -> str:
    """What is trained in a way of ours beside the library's, in bfloat16."""
    lines = []
    for row in rows:
        if row["dtype"] == "bfloat16":
            ratio = float(row["library_ms"]) / float(row["ours_ms"])
            what = [row["convolution"], row["shape"], row["passes"]]
            lines.append([*what, row["ours_ms"], f"{row['library_ms']}, **{ratio:.1f} x**"])
    return markdown(["operation", "shape", "", "ours, ms", "the library's"], lines) if lines else NOT_YET


def reading_table(rows: list[Row]) -> str:
    """Where pictures come from, how fast, and how long a training step waits for them."""
    lines = [
        [
            row["machine"],
            row["source"],
            f"{row['pictures_per_second']} ({row['least']} to {row['most']})",
            f"{float(row['waiting_share']):.1%}",
        ]
        for row in rows
    ]
    return (
        markdown(["machine", "256 px from", "pictures a second", "of a step spent waiting"], lines) if rows else NOT_YET
    )


def processor_tables(amx: bool) -> dict[str, str]:
    """What was measured on the processor with AMX, or without, that it was last measured on."""
    others = {"profile": profile_table, "roofline": roofline_table, "convolutions": convolution_table}

    def rows(name: str) -> list[Row]:
        return of_processor(read_rows(RESULTS / f"{name}.csv"), amx)

    return speed_tables(rows("speed")) | {name: table(rows(name)) for name, table in others.items()}


def main() -> None:
    tables = processor_tables(amx=False)
    tables |= gpu_tables(read_rows(FORMER / "speed.csv"))  # no GPU has had the block of today
    tables["steps on a GPU"] = step_time_table(read_rows(FORMER / "step-time.csv"))
    tables["memory beside a GPU"] = beside_gpu_table(read_rows(FORMER / "memory-beside-gpu.csv"))
    tables["memory"] = memory_table(read_rows(RESULTS / "memory.csv"))
    tables["precision"] = precision_table(read_rows(RESULTS / "precision.csv"))
    tables["reading"] = reading_table(read_rows(RESULTS / "data.csv"))
    write_tables(tables, DOCUMENT)
    write_tables(processor_tables(amx=True), AMX_DOCUMENT)


if __name__ == "__main__":
    main()
