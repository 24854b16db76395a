"""σ_max against the length of the canvas: from where on the one character that is asked for is drawn, and black is."""

import math
from itertools import pairwise

import numpy as np

from studies.datasets import WORK, DataSet, reference
from studies.harness import Measures, Results, Study
from studies.intervals import differs, seed_interval, told
from studies.measures import drawn
from studies.page import PageParts
from studies.pictures import COUNT_TAGS
from studies.plots import Line, Panel
from studies.training import BATCH, run_config, train
from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.sigmas import SigmaMax
from sumizome.evaluate.classifier import TagClassifier
from sumizome.evaluate.scores import Interval, brightness
from sumizome.inference import SamplingConfig
from sumizome.models.sdxl import SDXLModel

__all__ = ["CANVAS", "LENGTHS", "START", "STARTS", "enough", "growth", "single"]

LENGTHS = {"1": 32, "1.5": 48, "2": 64, "3": 96}
"""Canvas length → px; a latent is 4 px wide, so 8, 12, 16 and 24 of them."""
START = 14.6146 * 8 / 128
"""What 14.6 is to SDXL's 128 latents, on 8: 0.913. The canvas of length 1 starts here, the others by the rule at
START times their length."""
STARTS: tuple[float, ...] = tuple(START * factor for factor in (0.5, 1, 1.5, 2, 3, 6))
STEPS, PICTURES, BLACKS = 1000, 16, 8
_HAIR = ("blonde", "brown", "black", "red", "blue", "green", "pink", "white")


def _data(arm: str) -> DataSet:
    return DataSet("people", LENGTHS[arm])


def _measure(arm: str, seed: int) -> Measures:
    """Each canvas has a model of its own, trained on that canvas: what differs is its length, not what was learned."""
    data = _data(arm)
    held, classifier = reference(data)
    alone = [held.images[place] for place in held.test.tolist() if "solo" in held.tag_lists[place]]
    measures: Measures = {
        "real": float(single(classifier, alone).mean()),
        "told": {tag: tag in classifier.skills for tag in COUNT_TAGS},
        "starts": {},
    }

    def look(step: int, model: SDXLModel) -> None:
        for start in (*STARTS, "pure"):
            measures["starts"][f"{start:.4g}" if start != "pure" else start] = _drawn_from(
                model, classifier, start, data.side
            )

    train(run_config(data, seed, STEPS, WORK / "runs" / "canvas" / f"{arm}-seed{seed}"), look)
    return measures


def _drawn_from(model: SDXLModel, classifier: TagClassifier, start: SigmaMax, side: int) -> dict[str, float]:
    sampling = SamplingConfig(steps=12, sigma_max=start, guidance=GuidanceConfig(4.0))
    asked = [f"solo, {_HAIR[number % len(_HAIR)]} hair" for number in range(PICTURES)]
    people = drawn(model, asked, sampling, (side, side))
    black = drawn(model, ["completely black"] * BLACKS, sampling, (side, side))
    return {
        "single": float(single(classifier, [image[None] for image in people]).mean()),
        "black": float(brightness(black).mean()),
        "spread": float(brightness(people).std()),
    }


def single(classifier: TagClassifier, images: list[np.ndarray]) -> np.ndarray:
    """Which pictures show one character and no more, as the classifier tells."""
    found = classifier.found(images)
    others = [found[tag] for tag in COUNT_TAGS if tag != "solo" and tag in found]
    return np.asarray(found["solo"] & ~np.logical_or.reduce(others))


def _page(results: Results) -> PageParts:
    starts = [f"{start:.4g}" for start in STARTS] + ["pure"]
    rows = [["σ_max", *(f"length {arm}: one character · black" for arm in LENGTHS)]]
    for start in starts:
        cells = [" · ".join(told(_of(results, arm, start, what), 2) for what in ("single", "black")) for arm in LENGTHS]
        rows.append([start, *cells])
    real = ", ".join(f"{seed_interval(results.seeds(arm, lambda m: m['real'])).value:.2f}" for arm in LENGTHS)
    ticks = [(start, f"{start:g}") for start in (0.25, 0.5, 1, 2, 4)]
    asked_for, black = "share of pictures asked for with one", "mean brightness of “completely black”"

    def line(arm: str, what: str, unit: float = 1.0) -> Line:
        values = [_of(results, arm, start, what) for start in starts[:-1]]
        return Line(f"length {arm}", [start / unit for start in STARTS], values)

    def panel(title: str, x_title: str, y_title: str, lines: list[Line]) -> Panel:
        return Panel(title, x_title, y_title, lines, x_log=True, ticks=ticks, share=True)

    return PageParts(
        method=f"A model a canvas length and seed, each trained {STEPS} steps of {BATCH} pictures on its own canvas "
        "(32, 48, 64, 96 px) with pictures of no, one, two or three characters and flat black and white, zero "
        f"terminal SNR. Each is then sampled from several σ_max: {START:.3g} (14.6 · 8/128, what the canvas of length "
        "1 would inherit), multiples of it, and pure noise. So canvases differ in length and the model knows its "
        f"own, as in the report, where 1024² starts at what 512² used. {PICTURES} pictures of “solo” a seed and "
        "start, 12 Euler steps, guidance 4.",
        table=rows,
        table_note="One character: the share of pictures asked for with “solo” in which a classifier, trained on the "
        f"data's own tags, finds one character and no other number of them (real pictures of one, by length: {real}). "
        "Black: mean brightness of “completely black”, 0 to 1.",
        panels=tuple(
            shown
            for title, what, unit in (("One character", "single", asked_for), ("Black", "black", black))
            for shown in (
                panel(title, "σ_max", unit, [line(arm, what) for arm in LENGTHS]),
                panel(
                    "… σ_max by the length",
                    "σ_max / canvas length",
                    unit,
                    [line(arm, what, float(arm)) for arm in LENGTHS],
                ),
            )
        ),
        plot_says="Share of pictures with one character, and brightness of black, against σ_max by canvas length.",
        conclusion="\n".join(_sentences(results)),
        at_full_size="SDXL's pictures have more detail that is not redundant than flat drawings, so that its σ "
        "should grow less than √area for what is decided by detail, and as √area for what is decided by the whole "
        "canvas, as brightness is. Its canvases are 128 latents long: all sigmas here are 14.6 · 8/128 and "
        "multiples, a sixteenth of its own.",
    )


def _of(results: Results, arm: str, start: str, what: str) -> Interval:
    return seed_interval(results.seeds(arm, lambda measures: measures["starts"][start][what]))


def enough(measures: Measures, what: str) -> float:
    """The σ_max at which a number is half-way from its value at the lowest start to that of pure noise.

    Between starts, log σ is interpolated; 0 where the lowest start is within a tenth of pure noise already.
    """
    values = [measures["starts"][f"{start:.4g}"][what] for start in STARTS]
    goal = measures["starts"]["pure"][what]
    if abs(values[0] - goal) < 0.1:
        return 0.0
    shares = [(value - values[0]) / (goal - values[0]) for value in values]
    for (low, share), (high, next_share) in pairwise(zip(STARTS, shares, strict=True)):
        if next_share >= 0.5:
            at = (0.5 - share) / (next_share - share)
            return float(math.exp(math.log(low) + at * (math.log(high) - math.log(low))))
    return math.inf


def growth(results: Results, what: str) -> tuple[list[str], Interval | None]:
    """σ_max by length in words, and the exponent e of σ ∝ length^e, fitted for each seed."""
    lengths = [float(arm) for arm in LENGTHS]
    by_arm = {arm: results.seeds(arm, lambda m: enough(m, what)) for arm in LENGTHS}
    words = [f"{arm}: {', '.join(f'{value:.2f}' for value in values)}" for arm, values in by_arm.items()]
    rows = [[by_arm[arm][seed] for arm in LENGTHS] for seed in range(len(next(iter(by_arm.values()))))]
    if not all(0 < value < math.inf for row in rows for value in row):
        return words, None
    slopes = [float(np.polyfit(np.log(lengths), np.log(row), 1)[0]) for row in rows]
    return words, seed_interval(slopes)


def _sentences(results: Results) -> list[str]:
    sentences = []
    for what, name in (("black", "Black"), ("single", "One character")):
        words, exponent = growth(results, what)
        told_as = (
            f"σ grows as length to the power {told(exponent, 2)} (1 is √area, 0 no growth)"
            if exponent is not None
            else "no exponent: not every canvas and seed passes from one to the other within the starts tried"
        )
        sentences.append(
            f"- {name}: the σ_max half-way between the lowest start's result and pure noise's, by length, each seed: "
            f"{'; '.join(words)}. Here {told_as}."
        )
        if exponent is not None and differs(exponent) and exponent.high < 1:
            sentences[-1] += " √area is more than is needed: an upper bound, as the report says."
        elif exponent is not None and exponent.low <= 1 <= exponent.high:
            sentences[-1] += " √area is within what was measured."
    return sentences


CANVAS = Study(
    name="canvas",
    title="σ_max and the length of the canvas",
    question="The report scales σ_max with the canvas' length, √area, and calls that an upper bound. From which σ on "
    "is the one character drawn that was asked for, on canvases of 1, 1.5, 2 and 3 times the length?",
    arms={arm: f"canvas of {side} px, {side // 4} × {side // 4} latents" for arm, side in LENGTHS.items()},
    settings={"steps": STEPS, "sampling_steps": 12, "guidance": 4.0, "pictures": PICTURES, "black": BLACKS},
    data=tuple(_data(arm) for arm in LENGTHS),
    measure=_measure,
    page=_page,
)
