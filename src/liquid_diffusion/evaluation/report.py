"""Figures of an evaluation as a table for a terminal."""

from __future__ import annotations

from typing import Any

from liquid_diffusion.columns import aligned

_ROWS = (
    ("kernel distance", "kd"),
    ("Frechet distance", "fd"),
    ("precision", "precision"),
    ("recall", "recall"),
)


def _distances(figures: dict[str, Any]) -> dict[str, str]:
    return {
        "kd": f"{figures['kd']:.4f} +- {figures['kd_standard_error']:.4f}",
        "fd": f"{figures['fd']:.1f}",
        "precision": f"{figures['precision']:.3f}",
        "recall": f"{figures['recall']:.3f}",
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table(facts: dict[str, Any]) -> str:
    """The facts of `evaluate.measure` in words and columns."""
    setting = facts["samples"]
    lines = [
        f"{setting['n']} samples of {facts['run']} ({setting['solver']}, {setting['steps']} steps, guidance "
        f"{setting['guidance']:g}) against {facts['reference_pictures']} real pictures ({setting['reference']}), "
        f"features {setting['features']}",
        "",
    ]
    samples, real = _distances(facts), _distances(facts["real"]) if "real" in facts else None
    rows = [["", "samples", *(["training pictures"] if real else [])]]
    rows += [[words, samples[key], *([real[key]] if real else [])] for words, key in _ROWS]
    lines += aligned(rows)
    if facts["classes_as_in_reference"] is False:
        lines.append("(the reference tells no classes that the model knows: each of its own was drawn equally often)")
    lines.append(f"(Frechet distance, precision and recall at {facts['fd_pictures']} pictures a side)")
    if "class_agreement" in facts:
        unseen = facts.get("class_accuracy_held_out")
        beside = "" if unseen is None else f"; of held-out pictures {unseen:.1%}"
        lines += [
            "",
            f"A linear classifier takes {facts['class_agreement']:.1%} of the samples for their class{beside}.",
        ]
    if "memorisation" in facts:
        memory = facts["memorisation"]
        spaces = (("features", memory["feature_distance"]), ("pixels", memory["pixel_distance"]))
        rows = [["nearest training picture in", "samples, median", "held out, median", "ratio", "under 1st percentile"]]
        for space, near in spaces:
            ratio, share = near["ratio"], near["share_of_samples_nearer"]
            told = ["-", "-"]
            if ratio is not None:
                error = near["ratio_standard_error"]
                told[0] = f"{ratio:.2f}" if error is None else f"{ratio:.2f} +- {error:.2f}"
            if share is not None:
                told[1] = f"{share:.1%} of the samples"
            rows.append([space, _number(near["samples_median"]), _number(near["held_out_median"]), *told])
        lines += ["", *aligned(rows)]
        if memory["held_out_weighted_by_class"]:
            lines.append("(held-out pictures count so that each class is as frequent among them as among the samples)")
        if memory["held_out_seen"]:
            seen = f"{memory['held_out_seen']} of {memory['held_out_pictures']} held-out pictures"
            lines.append(f"({seen} are the same as a picture that was trained on, at this size, and left out here)")
        if "nearest_pairs" in facts:
            lines.append(f"(the nearest pairs: {facts['nearest_pairs']})")
    return "\n".join(lines)
