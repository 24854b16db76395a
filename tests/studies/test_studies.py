"""The studies' harness and measures: held to closed cases; the training is the trainer's, tested elsewhere."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from scipy import stats

from studies import canvas, harness, tag_weights
from studies.all_studies import STUDIES
from studies.harness import SEEDS, Results, Study, collect, read_results, run_studies
from studies.intervals import difference, differs, paired, seed_interval
from studies.page import markdown_table
from studies.pictures import PALETTE, _disc, disc_shares, ground_shares
from studies.uptraining import matched_schedule
from sumizome.diffusion.schedule import ScheduleConfig, build_noise_schedule


def test_an_interval_of_three_seeds_is_students() -> None:
    found = seed_interval([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_what_seeds_share_falls_out_of_a_difference() -> None:
    base = [0.1, 5.0, 9.0]
    moved = paired([value + 0.5 for value in base], base)
    assert moved.value == pytest.approx(0.5)
    assert moved.high - moved.low < 1e-9
    assert differs(moved)
    assert difference(moved, "higher", "lower") == "higher by 0.500 ± 0.000"
    assert difference(paired([0.0, 1.0, 2.0], [1.0, 0.0, 2.0]), "higher", "lower").startswith("not told apart")


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Study, list[tuple[str, int]]]]:
    """A study that trains nothing, and what it was asked to measure."""
    made: list[tuple[str, int]] = []

    def measure(arm: str, seed: int) -> dict[str, float]:
        made.append((arm, seed))
        return {"value": seed / 3}

    study = replace(STUDIES[0], name="counted", arms={"a": "one", "b": "other"}, data=(), measure=measure)
    monkeypatch.setattr(harness, "WORK", tmp_path / "work")
    monkeypatch.setattr(harness, "PAGES", tmp_path / "pages")
    monkeypatch.setattr(harness, "base_model", lambda seed: tmp_path)
    monkeypatch.setattr("studies.all_studies.STUDIES", (study,))
    yield study, made


def test_an_interrupted_study_goes_on_where_it_was(counted: tuple[Study, list[tuple[str, int]]]) -> None:
    study, made = counted
    list(run_studies([study], 1))
    assert sorted(made) == [(arm, seed) for arm in ("a", "b") for seed in SEEDS]
    lost = harness.WORK / "results/counted/b-seed1.json"
    lost.unlink()
    made.clear()
    list(run_studies([study], 1))
    assert made == [("b", 1)]
    made.clear()
    list(run_studies([replace(study, settings={"steps": 7})], 1))
    assert len(made) == 2 * len(SEEDS)  # results of other settings do not count


def test_the_page_is_made_of_what_was_measured(counted: tuple[Study, list[tuple[str, int]]]) -> None:
    study, _ = counted
    list(run_studies([study], 1))
    results = collect(study)
    assert results.seeds("b", lambda measures: measures["value"]) == [0, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert read_results("counted") == results
    assert json.loads((harness.PAGES / "counted.json").read_text())["results"][1]["seed"] == 1


def test_every_study_has_arms_and_a_name_of_its_own() -> None:
    assert len({study.name for study in STUDIES}) == len(STUDIES) == 5
    assert all(len(study.arms) > 1 and len(SEEDS) >= 3 for study in STUDIES)


def test_a_drawn_disc_has_the_colours_that_its_tags_say() -> None:
    for number in range(12):
        image, (ground, disc) = _disc(Random(number))
        small = np.asarray(image.resize((32, 32)))[None]
        assert tag_weights.nearest_colour(tag_weights.region_colours(small, "ground")[0]) == ground.split()[0]
        assert tag_weights.nearest_colour(tag_weights.region_colours(small, "disc")[0]) == disc.split()[0]


def test_colours_have_a_long_tail() -> None:
    for shares in (ground_shares(), disc_shares()):
        assert set(shares) == set(PALETTE)
        assert sum(shares.values()) == pytest.approx(1)
        assert max(shares.values()) / min(shares.values()) == pytest.approx(12**1.5)
    assert list(ground_shares()) != list(disc_shares())


def test_the_matched_schedule_ends_where_the_canvas_mean_has_sdxls_noise() -> None:
    assert matched_schedule(128).beta_end == pytest.approx(ScheduleConfig().beta_end, rel=1e-4)
    assert float(build_noise_schedule(matched_schedule(16)).sigmas[-1]) == pytest.approx(14.6146 / 8, rel=1e-6)


def test_growth_with_the_length_is_read_off() -> None:
    """A number that passes from 1 to 0 at a sigma proportional to the length gives exponent 1; at one sigma, 0."""

    def results(exponent: float) -> Results:
        of = {}
        for arm in canvas.LENGTHS:
            middle = 1.5 * float(arm) ** exponent
            values = {f"{s:.4g}": {"black": 1 / (1 + (s / middle) ** 6)} for s in canvas.STARTS}
            of[arm] = {seed: {"starts": {**values, "pure": {"black": 0.0}}} for seed in SEEDS}
        return Results({}, of, 0.0)

    for exponent in (1.0, 0.0):
        found = canvas.growth(results(exponent), "black")[1]
        assert found is not None
        assert found.value == pytest.approx(exponent, abs=0.1)


def test_a_table_is_markdown() -> None:
    assert markdown_table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
