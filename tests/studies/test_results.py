"""Verdicts and pages follow from the numbers: planted effects are found, equal arms are not told apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studies import canvas, guidance, harness, min_snr, pages, results, tag_weights, uptraining
from studies.all_studies import STUDIES
from studies.harness import SEEDS, Results
from studies.results import Claim, claims, growth_verdict, page, verdict
from sumizome.evaluate.scores import Interval


def interval(value: float) -> dict[str, Any]:
    return {"value": value, "low": value, "high": value, "count": 3}


def measured(name: str, arm: str, seed: int) -> dict[str, Any]:
    """What a study's arm would measure if the report were right; seeds differ a little, and alike in all arms."""
    wobble = 0.01 * seed
    if name == "min-snr":
        error = 0.5 if arm == "plain" else 0.1
        return {
            "first_prediction": {"black": error + wobble},
            "colours": [{"colour": colour, "brightness": interval(wobble)} for colour in ("black", "white")],
            "validation": {"by_timestep": [{"timestep": t, "loss": interval(0.2)} for t in min_snr.TIMESTEPS]},
            "distance": {"kernel": interval(1.0)},
            "tags": {"recall": interval(0.5)},
        }
    if name == "uptraining":
        black = {"v-ztsnr": 0.01, "v": 0.2}.get(arm, 0.4) + wobble
        look = {"first_prediction": 0.1, "brightness": {"black": black, "white": 1.0}, "kernel": 1.0}
        steps = [*uptraining.LOOKS, uptraining.STEPS]
        after = {str(step): {**look, "velocity_loss": 0.3 if step < 50 else 0.1} for step in steps}
        return {"base": {**look, "velocity_loss": 0.2}, "after": after}
    if name == "guidance":
        looks = dict.fromkeys(("recall", "saturation", "sharpness", "burnt", "frechet"), 0.5)
        scales = {f"{s:g}": {**looks, "kernel": abs(s - 4.5) + wobble} for s in guidance.SCALES}
        return {"scales": scales, "real": {**looks, "kernel": 0.0}}
    if name == "canvas":
        middle = 1.5 * float(arm) ** (1 + 0.05 * (seed - 1))
        starts: dict[str, Any] = {}
        for start in canvas.STARTS:
            black = 1 / (1 + (start / middle) ** 6)
            starts[f"{start:.4g}"] = {"black": black, "single": 0.5, "spread": 0.1}
        return {"real": 0.9, "starts": {**starts, "pure": {"black": 0.0, "single": 0.5, "spread": 0.1}}}
    recall = {"tail": 0.6 if arm != "off" else 0.3, "middle": 0.7, "head": 0.9}
    bands = {band: {"recall": recall[band] + wobble, "error": 0.1} for band in tag_weights.BANDS}
    return {"ground": bands, "disc": bands}


def found(name: str) -> Results:
    (study,) = [study for study in STUDIES if study.name == name]
    of = {arm: {seed: measured(name, arm, seed) for seed in SEEDS} for arm in study.arms}
    return Results(study.settings, of, 1.0)


def test_a_difference_counts_where_its_interval_leaves_nothing_out() -> None:
    assert verdict(Interval(-0.2, -0.3, -0.1, 3), lower=True) == "yes"
    assert verdict(Interval(0.2, 0.1, 0.3, 3), lower=True) == "no: the other way"
    assert verdict(Interval(-0.2, -0.5, 0.1, 3), lower=True) == "not told apart"


def test_growth_is_held_to_none_and_to_the_square_root_of_the_area() -> None:
    assert growth_verdict(Interval(0.9, -0.2, 2.0, 3)) == "not told apart from no growth"
    assert growth_verdict(Interval(0.4, 0.2, 0.6, 3)) == "yes; √area is more than is needed"
    assert growth_verdict(Interval(0.9, 0.7, 1.1, 3)) == "yes"
    assert growth_verdict(Interval(1.5, 1.2, 1.8, 3)).startswith("no: √area is less")
    assert growth_verdict(Interval(-0.5, -0.7, -0.3, 3)) == "no: it falls"


@pytest.mark.parametrize(
    ("name", "verdicts"),
    [
        ("min-snr", ["no: worse than with a floor", "not told apart", "not told apart"]),
        ("uptraining", ["yes"] * 5),
        ("guidance", ["yes"]),
        ("canvas", ["yes", "not measured"]),
        ("tag-weights", ["yes", "not told apart"]),
    ],
)
def test_planted_effects_are_found_and_no_others(name: str, verdicts: list[str]) -> None:
    assert [claim.verdict for claim in claims[name](found(name))] == verdicts


def test_what_did_not_reproduce_is_said_plainly() -> None:
    good = Claim("a claim", "metric", "1", "0", "3 seeds", "yes", "make x")
    bad = Claim("another claim", "metric", "1", "2", "3 seeds", "no: the other way", "make y")
    text = page([good, bad])
    said = text.split("## What did not reproduce")[1]
    assert "another claim: no: the other way" in said and "a claim: yes" not in said
    assert "All of the above did." in page([good])


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_each_study_has_a_page(study: harness.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGES", tmp_path)
    pages.write_page(study, found(study.name))
    text = (tmp_path / f"{study.name}.md").read_text(encoding="utf-8")
    for heading in ("## What was done", "## Found", "## Conclusion", "## What would change at full size"):
        assert heading in text
    assert all(f"`{arm}`" in text for arm in study.arms)
    assert "nan" not in text and (tmp_path / f"{study.name}.png").stat().st_size > 5000
    pages.write_index(STUDIES)
    assert f"({study.name}.md)" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_demos_claims_need_its_evaluation_and_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "DEMO", tmp_path)
    monkeypatch.setattr(results, "PAGES", tmp_path)
    take: Callable[[], None] = results._take_demo
    take()
    assert not (tmp_path / "demo.json").exists()
