"""MinSNR against its terminal floor: what the step from pure noise learns, and what the others lose."""

from collections.abc import Callable

import numpy as np

from studies.datasets import WORK, DataSet
from studies.harness import Measures, Results, Study
from studies.intervals import difference, differs, paired, seed_interval, told
from studies.measures import TIMESTEPS, evaluated, first_prediction_error
from studies.page import PageParts
from studies.plots import Line, Panel
from studies.training import BATCH, run_config, train
from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.loss import LossConfig
from sumizome.evaluate.config import EvaluateConfig
from sumizome.evaluate.scores import Interval
from sumizome.inference import SamplingConfig
from sumizome.models.sdxl import SDXLModel

__all__ = ["ARMS", "DATA", "DEFAULT_ARM", "MIN_SNR", "NUMBERS"]

DATA = DataSet("demo", 64, square=False)
STEPS = 360
ARMS = {
    "plain": (LossConfig("min_snr", terminal_floor=0.0), "MinSNR, γ = 5, as written"),
    "floor-0.03": (LossConfig("min_snr", terminal_floor=0.03), "MinSNR, at least 0.03 where SNR < 1"),
    "floor-0.1": (LossConfig("min_snr", terminal_floor=0.1), "MinSNR, at least 0.1"),
    "floor-0.3": (LossConfig("min_snr", terminal_floor=0.3), "MinSNR, at least 0.3"),
    "soft": (LossConfig("soft_min_snr", terminal_floor=0.0), "soft MinSNR, γ = 5, no floor"),
    "none": (LossConfig("uniform", terminal_floor=0.0), "no weighting: 1 everywhere"),
}
DEFAULT_ARM = "floor-0.1"

_EVALUATION = EvaluateConfig(
    seeds=8,
    colours=("black", "white", "grey"),
    pictures=48,
    validation_count=48,
    timesteps=TIMESTEPS,
    guidance_scales=(),
    max_chunks=1,
    sampling=SamplingConfig(steps=12, guidance=GuidanceConfig(4.0)),
)


def _measure(arm: str, seed: int) -> Measures:
    run_dir = WORK / "runs" / "min-snr" / f"{arm}-seed{seed}"
    measures: Measures = {}

    def look(step: int, model: SDXLModel) -> None:
        measures.update(evaluated(model, DATA, _EVALUATION))
        measures["first_prediction"] = {c: first_prediction_error(model, c) for c in ("black", "white", "grey")}

    train(run_config(DATA, seed, STEPS, run_dir, loss=ARMS[arm][0]), look)
    return measures


def _page(results: Results) -> PageParts:
    floors = [arm for arm in ARMS if arm.startswith("floor")]
    rows = [
        [
            "arm",
            "first prediction of black",
            "black",
            "white",
            "loss, t < 900",
            "loss, t = 999",
            "kernel distance",
            "recall",
        ]
    ]
    rows += [
        [f"`{arm}`", *(told(seed_interval(results.seeds(arm, number))) for number in NUMBERS.values())] for arm in ARMS
    ]

    def against_plain(arm: str, number: str) -> Interval:
        return paired(results.seeds(arm, NUMBERS[number]), results.seeds("plain", NUMBERS[number]))

    def sentence(arm: str) -> str:
        first = difference(against_plain(arm, "first"), "higher", "lower")
        black = difference(against_plain(arm, "black"), "brighter", "darker")
        body = difference(against_plain(arm, "body"), "higher", "lower", 4)
        kernel = difference(against_plain(arm, "kernel"), "farther", "nearer", 1)
        return (
            f"- `{arm}` beside `plain`: error of the first prediction {first}; sampled black {black}; loss below t = "
            f"900 {body}; kernel distance {kernel}."
        )

    return PageParts(
        method=f"Tiny models trained from nothing, {STEPS} steps of {BATCH} pictures, on the demo's drawings (another "
        "seed), 16 × 16 latents, SDXL's schedule rescaled to zero terminal SNR; the arms differ in the loss weights "
        "alone. Sampled with 12 Euler steps from pure noise, guidance 4.",
        table=rows,
        table_note="First prediction: root mean square error of D(pure noise; “completely black”), relative to the "
        "size of black's latents, unguided; black's latents are known exactly, so 0 is right and 1 is the answer 0. "
        "Black, white: mean brightness of sampled pictures, 0 to 1. Loss: mean squared error of the velocity, "
        "unweighted, of 48 held-out pictures; t < 900 is the mean over nine timesteps. Kernel distance: of 48 "
        "pictures from held-out captions to held-out pictures, in a small network trained on the data's tags, lower "
        "is nearer; recall: share of the asked tags found by it.",
        panels=(
            Panel(
                "The step from pure noise",
                "",
                "error of the first prediction of black",
                [Line("", range(len(ARMS)), [seed_interval(results.seeds(arm, NUMBERS["first"])) for arm in ARMS])],
                ticks=[(place, arm) for place, arm in enumerate(ARMS)],
                points=True,
            ),
            Panel(
                "Loss beside plain MinSNR",
                "timestep; 999 is pure noise",
                "difference of the velocity's mean squared error",
                [
                    Line(
                        arm,
                        TIMESTEPS,
                        [paired(_loss_at(results, arm, t), _loss_at(results, "plain", t)) for t in TIMESTEPS],
                    )
                    for arm in ARMS
                    if arm != "plain"
                ],
                from_zero=False,
            ),
        ),
        plot_says="Error of the first prediction by arm, and the loss by timestep beside plain MinSNR.",
        conclusion="\n".join([*map(sentence, [arm for arm in ARMS if arm != "plain"]), "", _verdict(results, floors)]),
        at_full_size="On SDXL's 128 × 128 latents a flat colour is still told at σ = 128, on these 16 × 16 at σ = 16 "
        "(the mean over the canvas has noise σ / side). MinSNR's weight falls as 1/σ², so at the levels that decide "
        "the canvas' brightness it is 64 times smaller there: what a floor buys should be more, not less. A model of "
        "2.6 G parameters shares less between neighbouring timesteps than one of 1.1 M, which points the same way. "
        "What a floor costs at other timesteps depends on how far training has come; after a few hundred steps of a "
        "tiny model it says little of a finished one.",
    )


def _verdict(results: Results, floors: list[str]) -> str:
    """The least floor whose first prediction is as good as the best floor's, by the means."""
    means = {arm: seed_interval(results.seeds(arm, NUMBERS["first"])).value for arm in floors}
    best = min(means, key=means.__getitem__)
    enough = next(
        arm
        for arm in floors
        if not differs(paired(results.seeds(arm, NUMBERS["first"]), results.seeds(best, NUMBERS["first"])))
    )
    least, most = (results.seeds(arm, NUMBERS["body"]) for arm in (enough, floors[-1]))
    cost = difference(paired(most, least), "higher", "lower", 4)
    return (
        f"The lowest error among the floors is `{best}`'s ({means[best]:.3f}); the least floor that is not told apart "
        f"from it is `{enough}` ({means[enough]:.3f}). Below t = 900 the loss of `{floors[-1]}` beside it is {cost}. "
        f"The default of `loss.terminal_floor` follows: {LossConfig().terminal_floor:g}."
    )


def _loss_at(results: Results, arm: str, timestep: int) -> list[float]:
    return results.seeds(arm, lambda measures: _losses(measures)[timestep])


def _losses(measures: Measures) -> dict[int, float]:
    return {row["timestep"]: row["loss"]["value"] for row in measures["validation"]["by_timestep"]}


def _brightness(measures: Measures, colour: str) -> float:
    (row,) = [row for row in measures["colours"] if row["colour"] == colour]
    return float(row["brightness"]["value"])


NUMBERS: dict[str, Callable[[Measures], float]] = {
    "first": lambda measures: measures["first_prediction"]["black"],
    "black": lambda measures: _brightness(measures, "black"),
    "white": lambda measures: _brightness(measures, "white"),
    "body": lambda measures: float(np.mean([loss for t, loss in _losses(measures).items() if t < 900])),
    "terminal": lambda measures: _losses(measures)[999],
    "kernel": lambda measures: measures["distance"]["kernel"]["value"],
    "recall": lambda measures: measures["tags"]["recall"]["value"],
}
"""The columns of the table."""


MIN_SNR = Study(
    name="min-snr",
    title="MinSNR and its terminal floor",
    question="MinSNR gives the step from pure noise a weight of exactly 0. Does that step learn from its neighbours "
    "all the same, what does a floor under the weight buy, and what does it cost elsewhere?",
    arms={arm: words for arm, (_, words) in ARMS.items()},
    settings={"steps": STEPS, "sampling_steps": 12, "guidance": 4.0, "pictures": 48},
    data=(DATA,),
    measure=_measure,
    page=_page,
)
