"""Tag-based loss weighting: what rare tags gain and common ones lose, at several strengths."""

from random import Random

import numpy as np

from studies.datasets import WORK, DataSet
from studies.harness import Measures, Results, Study
from studies.intervals import difference, paired, seed_interval, told
from studies.measures import drawn
from studies.page import PageParts
from studies.pictures import PALETTE, disc_shares, ground_shares
from studies.plots import Line, Panel
from studies.training import BATCH, run_config, train
from sumizome.data.tags import TagWeightConfig
from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.evaluate.scores import Interval
from sumizome.inference import SamplingConfig
from sumizome.models.sdxl import SDXLModel

__all__ = ["BANDS", "TAG_WEIGHTS", "band_number", "nearest_colour", "region_colours"]

DATA = DataSet("discs", 32)
STEPS, EACH = 1000, 6
ARMS = {
    "off": (TagWeightConfig(), "none"),
    "0.5": (TagWeightConfig(strength=0.5), "strength 0.5, images bounded to 0.5 … 2"),
    "1": (TagWeightConfig(strength=1.0), "strength 1, the same bounds"),
    "1-wide": (TagWeightConfig(strength=1.0, min_weight=0.1, max_weight=10.0), "strength 1, bounded to 0.1 … 10"),
}
BANDS = {"head": range(3), "middle": range(3, 7), "tail": range(7, 12)}
"""Ranks of the colours by how often they are the ground, or the disc."""


def _measure(arm: str, seed: int) -> Measures:
    config = run_config(
        DATA, seed, STEPS, WORK / "runs" / "tag-weights" / f"{arm}-seed{seed}", tag_weights=ARMS[arm][0]
    )
    measures: Measures = {}

    def look(step: int, model: SDXLModel) -> None:
        measures.update({"ground": _obeyed(model, "ground"), "disc": _obeyed(model, "disc")})

    train(config, look)
    return measures


def _obeyed(model: SDXLModel, part: str) -> dict[str, dict[str, float]]:
    """Of each band: in what share of pictures the part has the colour asked for, and how far its colour is off.

    Its partner's colour is drawn as often as in the data, so that every prompt is of the data's kind.
    """
    shares = {"ground": ground_shares(), "disc": disc_shares()}
    partner = "disc" if part == "ground" else "ground"
    rng = Random(f"partners:{part}")
    asked, prompts = [], []
    for colour in shares[part]:
        others = [name for name in shares[partner] if name != colour]
        for other in rng.choices(others, weights=[shares[partner][name] for name in others], k=EACH):
            names = {part: colour, partner: other}
            asked.append(colour)
            prompts.append(f"{names['ground']} background, {names['disc']} disc")
    sampling = SamplingConfig(steps=12, guidance=GuidanceConfig(3.0))
    colours = region_colours(drawn(model, prompts, sampling, (DATA.side, DATA.side)), part)
    right = np.array([nearest_colour(found) == name for found, name in zip(colours, asked, strict=True)])
    off = np.sqrt(np.square(colours - [PALETTE[name] for name in asked]).mean(axis=1)) / 255
    rank = np.array([list(shares[part]).index(name) for name in asked])
    return {
        band: {"recall": float(right[inside].mean()), "error": float(off[inside].mean())}
        for band, ranks in BANDS.items()
        if (inside := np.isin(rank, list(ranks))).any()
    }


def region_colours(images: np.ndarray, part: str) -> np.ndarray:
    """The median colour [n, 3] of each picture's rim (ground) or middle (disc)."""
    side = images.shape[1]
    if part == "disc":
        inside = slice(round(side * 0.36), round(side * 0.64))
        return np.asarray(np.median(images[:, inside, inside].reshape(len(images), -1, 3).astype(np.float64), axis=1))
    rim = np.ones((side, side), bool)
    rim[round(side * 0.1) : round(side * 0.9), round(side * 0.1) : round(side * 0.9)] = False
    return np.asarray(np.median(images[:, rim].astype(np.float64), axis=1))


def nearest_colour(colour: np.ndarray) -> str:
    """The palette's colour that is nearest in RGB."""
    names = list(PALETTE)
    return names[int(np.square(np.array([PALETTE[name] for name in names]) - colour).sum(axis=1).argmin())]


def _page(results: Results) -> PageParts:
    rows = [["arm", *(f"{band}: obeyed · off by" for band in BANDS)]]
    rows += [
        [
            f"`{arm}`",
            *(
                f"{told(_of(results, arm, band, 'recall'), 2)} · {told(_of(results, arm, band, 'error'))}"
                for band in BANDS
            ),
        ]
        for arm in ARMS
    ]
    shares = list(ground_shares().values())
    bands = "; ".join(f"{band}: {100 * sum(shares[r] for r in ranks):.0f} %" for band, ranks in BANDS.items())

    def panel(what: str, title: str, unit: str) -> Panel:
        lines = [Line(band, range(len(ARMS)), [_of(results, arm, band, what) for arm in ARMS]) for band in BANDS]
        ticks = list(enumerate(ARMS))
        return Panel(title, "strength of the weights", unit, lines, ticks=ticks, share=what == "recall")

    return PageParts(
        method=f"Tiny models trained from nothing, {STEPS} steps of {BATCH} pictures of 32 px: a disc of one of "
        "twelve colours on a ground of another, each colour as often as 1/rank^1.5, so that the most frequent is 41 "
        f"times as common as the least. The arms differ in `tag_weights` alone. Each colour is then asked for {EACH} "
        "times as ground and as disc, 12 Euler steps, guidance 3.",
        table=rows,
        table_note=f"Share of all grounds by band of ranks (1–3, 4–7, 8–12): {bands}; discs the same in another "
        "order. Obeyed: the share of pictures whose rim (or middle) has its median colour nearest to the one asked "
        "for, of the twelve; chance is 0.08. Off by: root mean square distance of that median from the colour asked "
        "for, as a share of the range. No classifier has a part in it.",
        panels=(
            panel("recall", "Obeyed", "share of pictures with the colour asked for"),
            panel("error", "Off by", "distance from the colour, share of the range"),
        ),
        plot_says="Share of obeyed colours and their error, by band of frequency and strength of the weights.",
        conclusion="\n".join(_sentences(results)),
        at_full_size="A real collection has tens of thousands of tags and pictures with thirty of them each: a "
        "picture's weight is a mean over its tags, most of them common, so that the bounds are reached more rarely "
        "and the effect is diluted. There a rare tag is also seen thousands of times over a run, where it was seen "
        "some dozens of times here.",
    )


def band_number(measures: Measures, band: str, what: str) -> float:
    return float(np.mean([measures[part][band][what] for part in ("ground", "disc")]))


def _of(results: Results, arm: str, band: str, what: str) -> Interval:
    return seed_interval(results.seeds(arm, lambda measures: band_number(measures, band, what)))


def _sentences(results: Results) -> list[str]:
    sentences = []
    for arm in ARMS:
        if arm == "off":
            continue
        parts = []
        for band in BANDS:
            recall, error = (
                paired(*(results.seeds(a, lambda m, b=band, w=what: band_number(m, b, w)) for a in (arm, "off")))
                for what in ("recall", "error")
            )
            parts.append(
                f"{band} obeyed {difference(recall, 'more', 'less', 2)}, off {difference(error, 'more', 'less')}"
            )
        sentences.append(f"- `{arm}` beside `off`: {'; '.join(parts)}.")
    return sentences


TAG_WEIGHTS = Study(
    name="tag-weights",
    title="Loss weights by the rarity of tags",
    question="With the loss of rare tags' pictures raised and that of common ones lowered: are rare tags obeyed more "
    "often, and what do the common ones lose?",
    arms={arm: words for arm, (_, words) in ARMS.items()},
    settings={"steps": STEPS, "sampling_steps": 12, "guidance": 3.0, "pictures_of_each_colour": EACH},
    data=(DATA,),
    measure=_measure,
    page=_page,
)
