from __future__ import annotations

from pathlib import Path

import pytest
from figures import (
    NOT_YET,
    Row,
    best_learning_rate,
    causal_table,
    comparison_tables,
    mean_and_error,
    of_any_clock,
    optimizer_table,
    times_table,
    tuning_table,
    verdict,
    write_tables,
)


def rows(model: str, *values: float, **changes: str) -> list[Row]:
    """Trainings of a model, one for each kernel distance."""
    base = {
        "split": "val", "fraction": "1", "budget": "480 s", "clock": "wall", "size": "32", "preset": "nano",
        "device": "x86_64", "threads": "2", "parameters": "5720652", "flops": "1e9", "steps": "1000", "lr": "0.001",
        "optimizer": "adamw", "time_shift": "1",
        "fd": "700", "precision": "0.5", "recall": "0.25", "kd_standard_error": "0.01",
        "loss": "0.2", "held_out_loss": "0.25", "seconds": "480",
    }  # fmt: skip
    return [base | {"model": model, "seed": str(seed), "kd": str(kd)} | changes for seed, kd in enumerate(values)]


def test_error_is_the_larger_of_seeds_and_pictures() -> None:
    assert mean_and_error(rows("a", 0.4)) == (0.4, 0.01)
    value, error = mean_and_error(rows("a", 0.3, 0.4, 0.5))
    assert value == pytest.approx(0.4)
    assert error == pytest.approx(0.1 / 3**0.5)
    assert mean_and_error(rows("a", 0.4, 0.4, 0.4))[1] == pytest.approx(0.01 / 3**0.5)


def test_a_claim_wants_three_seeds_and_two_standard_errors() -> None:
    base = rows("liquid", 0.40, 0.40, 0.40)
    both = (2 * 0.01**2 / 3) ** 0.5
    assert verdict(rows("a", 0.2), base) == "no claim, 1 seed"
    assert verdict(rows("a", 0.2, 0.2), base) == "no claim, 2 seeds"
    assert verdict(rows("a", *[0.40 + 1.9 * both] * 3), base) == "none"
    assert verdict(rows("a", *[0.40 + 2.1 * both] * 3), base) == "worse, 2.1 standard errors"
    assert verdict(rows("a", *[0.40 - 3 * both] * 3), base) == "better, 3.0 standard errors"


def test_tables_hold_what_the_rows_say() -> None:
    some = rows("liquid", 0.4, 0.5, 0.6) + rows("peer", 0.8, 1.0, 1.2) + rows("liquid", 0.1, fraction="0.5")
    some += rows("liquid", 0.2, budget="9 s") + rows("liquid", 0.3, split="tune")
    table = comparison_tables(some, "liquid")
    assert table.count("**liquid**") == 1  # not the point on the way, nor the budget in which it is alone
    assert "| **liquid** | 0.500 ± 0.058 | 1.00 |" in table
    assert "| peer | 1.000 ± 0.115 | 0.50 | worse, 3.9 standard errors |" in table
    assert table.count("| 1000 | 480 | 0.001 | 3 |") == 2  # steps, and milliseconds of each
    assert table.startswith("480 s each, 32 px, size of nano, x86_64, 2 threads:")
    assert comparison_tables([], "liquid") == NOT_YET
    tuning = tuning_table(
        rows("a", 0.1, split="tune", lr="0.002", loss="0.4") + rows("a", 0.2, split="tune", lr="0.0005", loss="0.3")
    )
    assert tuning.splitlines()[0].startswith("480 s each, 32 px")
    assert tuning.splitlines()[2] == "| model | 0.0005 | 0.002 |"
    assert tuning.splitlines()[-1] == "| a | **0.300** | 0.400 |"


@pytest.mark.parametrize(("budget", "together"), [("32000 images", True), ("480 s", False)])
def test_trainings_of_equal_images_are_compared_whatever_the_clock(budget: str, together: bool) -> None:
    some = rows("liquid", 0.4, budget=budget) + rows("peer", 0.8, budget=budget, clock="cpu")
    assert (comparison_tables(of_any_clock(some), "liquid") != NOT_YET) is together


def test_a_learning_rate_is_chosen_by_the_loss_on_the_split_for_choices() -> None:
    """Where such a training ended, of an optimiser of its own; and a variant that was not tuned has ours."""
    some = rows("liquid", 0, split="tune", lr="0.004", loss="0.4") + rows(
        "liquid", 0, split="tune", lr="0.008", loss="0.3"
    )
    some += rows("liquid", 0, split="tune", lr="0.016", loss="0.2", fraction="0.5")
    some += rows("liquid", 0, lr="0.032", loss="0.1")
    some += rows("UNet2DModel", 0, split="tune", lr="0.016", optimizer="muon")
    some += rows("liquid", 0, split="tune", lr="0.064", loss="0.1", budget="1000 s")  # longest, and alone
    some += rows("liquid", 0, split="tune", lr="0.064", loss="0.1", budget="90 s")  # the best of shorter ones
    some += rows("liquid", 0, split="tune", lr="0.128", loss="0.2", budget="90 s")
    some += rows("liquid", 0, split="tune", lr="0.256", loss="0.3", budget="90 s")
    here = {"size": "32", "preset": "nano", "optimizer": "adamw"}
    assert best_learning_rate(some, "liquid", here) == "0.008"
    assert [best_learning_rate(some, name, here) for name in ("plain", "gate none")] == ["0.008", "0.008"]
    assert best_learning_rate(some, "UNet2DModel", here) is None
    assert best_learning_rate(some, "UNet2DModel", here | {"optimizer": "muon"}) == "0.016"


def test_training_times_are_chosen_by_the_kernel_distance_on_the_split_for_choices() -> None:
    some = rows("liquid", 0.4, 0.6, split="tune") + rows("liquid", 0.3, split="tune", time_shift="2")
    some += rows("peer", 0.7, split="tune") + rows("liquid", 0.1, time_shift="4")
    assert times_table(some).splitlines()[2:] == [
        "| model | shift 1 | shift 2 |",
        "| --- | --- | --- |",
        "| liquid | 0.500 ± 0.100 | **0.300 ± 0.010** |",
        "| peer | **0.700 ± 0.010** |  |",
    ]
    assert times_table(some).startswith("480 s each, 32 px, size of nano, x86_64, 2 threads:")
    assert tuning_table(some) == NOT_YET  # one rate is no choice of rates
    assert best_learning_rate(some, "liquid", some[0]) == "0.001"
    shifted = comparison_tables(rows("liquid", 0.4, time_shift="2") + rows("peer", 0.5, time_shift="2"), "liquid")
    assert shifted.startswith("480 s each, 32 px, size of nano, x86_64, 2 threads, training times shifted by 2:")


def test_optimisers_are_told_of_models_that_had_both() -> None:
    some = rows("liquid", 0.4, 0.5, 0.6) + rows("liquid", 0.1, 0.2, 0.3, optimizer="muon", seconds="500")
    table = optimizer_table(some + rows("peer", 0.8) + rows("peer", 0.7, optimizer="muon", budget="9 s"))
    assert table.splitlines()[-2:] == [
        "| liquid | AdamW | 0.500 ± 0.058 |  | 0.2500 | 480 | 3 |",
        "| liquid | Muon | 0.200 ± 0.058 | better, 3.7 standard errors | 0.2500 | 500 | 3 |",
    ]
    assert "peer" not in table
    assert table.startswith("480 s each, 32 px, size of nano, x86_64, 2 threads:")


def test_causal_table_has_a_row_for_each_intervention() -> None:
    base = {"run": "nano", "n": "48", "held_out": "100", "kd": "0.4", "kd_standard_error": "0.05"}
    some = [
        base | {"intervention": name, "steps": steps, "velocity_change": change}
        for name, change in (("none", "0"), ("alpha frozen", "0.0671"))
        for steps in ("12", "4")
    ]
    table = causal_table(some).splitlines()
    assert table[0] == "nano, 48 samples against 100 held-out pictures, Euler unless another solver is named:"
    assert table[2] == "| what is done | change of the velocity | KD, 4 steps | KD, 12 steps |"
    assert table[-1] == "| alpha frozen | 6.7% | 0.400 ± 0.050 | 0.400 ± 0.050 |"
    assert len(table) == 6
    assert causal_table([]) == NOT_YET


def test_tables_are_written_between_their_marks(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- one -->\nold\n<!-- end of one -->\nafter\n")
    for _ in range(2):  # again and again the same
        write_tables({"one": r"| new \1 |"}, document)
        assert document.read_text() == "before\n<!-- one -->\n| new \\1 |\n<!-- end of one -->\nafter\n"
    with pytest.raises(ValueError, match="no place for the table 'two'"):
        write_tables({"two": ""}, document)
