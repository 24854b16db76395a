"""One ε-trained model up-trained five ways, as the report did with SDXL: when it is itself again, and what black is."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from studies.datasets import WORK, DataSet
from studies.harness import Measures, Results, Study
from studies.intervals import difference, paired, seed_interval, told
from studies.measures import evaluated, first_prediction_error
from studies.page import PageParts
from studies.plots import Line, Panel
from studies.training import BATCH, finished_run, optimizer, run_config, train
from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.loss import LossConfig
from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import ScheduleConfig, build_noise_schedule
from sumizome.evaluate.config import EvaluateConfig
from sumizome.export import write_diffusers_folder
from sumizome.inference import SamplingConfig
from sumizome.models.sdxl import SDXLModel
from sumizome.train.config import TrainConfig

__all__ = ["BASE_SCHEDULE", "STEPS", "UPTRAINING", "matched_schedule", "recovery_words"]

DATA = DataSet("demo", 64, square=False)
BASE_STEPS, STEPS = 400, 400
LOOKS = (0, 25, 50, 100, 200, 300)
SAMPLED = 4
"""Pictures of a colour at each look."""
SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 1.8)
"""Where all arms' velocity errors are compared: all below the base's last sigma."""


def matched_schedule(latent_side: int) -> ScheduleConfig:
    """SDXL's betas, smaller by one factor, so that the last sigma hides as little of a small canvas as 14.6 of SDXL's.

    What is left of a flat colour under noise is told by the mean over the canvas, whose noise is sigma / side: so the
    last sigma is 14.6146 · side / 128.
    """
    wanted = 14.6146 * latent_side / 128
    base = ScheduleConfig(zero_terminal_snr=False)
    low, high = 0.0, 1.0
    for _ in range(50):
        factor = (low + high) / 2
        if float(build_noise_schedule(_scaled(base, factor)).sigmas[-1]) < wanted:
            low = factor
        else:
            high = factor
    return _scaled(base, high)


def _scaled(config: ScheduleConfig, factor: float) -> ScheduleConfig:
    return replace(config, beta_start=config.beta_start * factor, beta_end=config.beta_end * factor)


BASE_SCHEDULE = matched_schedule(16)


@dataclass(frozen=True)
class Arm:
    """How the base is trained on."""

    words: str
    prediction_type: PredictionType
    loss: LossConfig
    zero_terminal_snr: bool = False
    noise_offset: float = 0.0


_UNIFORM = LossConfig("uniform", terminal_floor=0.0)
ARMS = {
    "epsilon": Arm("ε as it was", "epsilon", _UNIFORM),
    "epsilon-min-snr": Arm("ε with MinSNR, γ = 5", "epsilon", LossConfig("min_snr", terminal_floor=0.0)),
    "epsilon-offset": Arm("ε with offset noise of 0.1", "epsilon", _UNIFORM, noise_offset=0.1),
    "v": Arm("v without zero terminal SNR", "v_prediction", LossConfig()),
    "v-ztsnr": Arm("v with zero terminal SNR", "v_prediction", LossConfig(), zero_terminal_snr=True),
}


def _base(seed: int) -> TrainConfig:
    """The run that all arms of a seed begin from: ε, without weights, on a schedule that ends early."""
    return run_config(
        DATA,
        seed,
        BASE_STEPS,
        WORK / "runs" / "uptraining" / f"base-seed{seed}",
        prediction_type="epsilon",
        schedule=BASE_SCHEDULE,
        loss=_UNIFORM,
    )


def _measure(arm_name: str, seed: int) -> Measures:
    arm = ARMS[arm_name]
    base = finished_run(_base(seed))
    folder = WORK / "runs" / "uptraining" / f"{arm_name}-seed{seed}"
    base_folder = folder.with_name(f"{folder.name}-base")
    write_diffusers_folder(replace(base, schedule_config=ScheduleConfig(False)), base_folder, overwrite=True)
    schedule = replace(BASE_SCHEDULE, zero_terminal_snr=arm.zero_terminal_snr)
    config = run_config(
        DATA,
        seed,
        STEPS,
        folder,
        model=base_folder,
        prediction_type=arm.prediction_type,
        schedule=schedule,
        loss=arm.loss,
        noise_offset=arm.noise_offset,
        # SDXL's text encoders know the words. The base's never had to tell black from white, since the last sigma told
        # it, and frozen they would keep that from every arm.
        optim=optimizer(STEPS),
    )
    measures: Measures = {"base": _base_look(seed), "after": {}}

    def look(step: int, model: SDXLModel) -> None:
        measures["after"][str(step)] = _look(model, pictures=32 if step == STEPS else 0)

    train(config, look, LOOKS)
    shutil.rmtree(base_folder)
    return measures


@lru_cache(maxsize=8)
def _base_look(seed: int) -> dict[str, Any]:
    return _look(finished_run(_base(seed)), pictures=32)


def _look(model: SDXLModel, *, pictures: int) -> dict[str, Any]:
    """`pictures`: drawn from captions for recall and distance; 0 = neither is measured."""
    schedule = build_noise_schedule(model.schedule_config)
    timesteps = tuple(schedule.timestep_of(torch.tensor(SIGMAS, dtype=torch.float64)).tolist())
    config = EvaluateConfig(
        seeds=SAMPLED,
        colours=("black", "white"),
        pictures=pictures,
        validation_count=32,
        timesteps=timesteps,
        guidance_scales=(),
        max_chunks=1,
        sampling=SamplingConfig(steps=12, guidance=GuidanceConfig(4.0)),
    )
    facts = evaluated(model, DATA, config)
    losses = [row["loss"]["value"] for row in facts["validation"]["by_timestep"]]
    assert all(map(math.isfinite, losses))
    drawn = {}
    if pictures:
        drawn["recall"] = facts["tags"]["recall"]["value"]
        drawn["kernel"] = facts["distance"]["kernel"]["value"]
    return {
        **drawn,
        "velocity_loss": sum(losses) / len(losses),
        "velocity_loss_by_sigma": dict(zip(map(str, SIGMAS), losses, strict=True)),
        "brightness": {row["colour"]: row["brightness"]["value"] for row in facts["colours"]},
        "colour_error": {row["colour"]: row["error"]["value"] for row in facts["colours"]},
        "first_prediction": first_prediction_error(model, "black"),
    }


def _page(results: Results) -> PageParts:
    last = str(STEPS)
    head = [
        "arm",
        "pictures until recovery",
        "black: first prediction",
        "black",
        "white",
        "velocity loss",
        "kernel distance",
    ]
    rows = [head]
    for arm in ARMS:
        rows.append(
            [
                f"`{arm}`",
                recovery_words(results, arm),
                *(
                    told(seed_interval(results.seeds(arm, lambda m, n=number: n(m["after"][last]))))
                    for number in (_first, _black, _white, _velocity, _kernel)
                ),
            ]
        )
    rows.append(
        [
            "the base",
            "–",
            *(
                told(seed_interval(results.seeds("epsilon", lambda m, n=number: n(m["base"]))))
                for number in (_first, _black, _white, _velocity, _kernel)
            ),
        ]
    )
    steps = (*LOOKS, STEPS)

    def line(arm: str, number: Callable[[Measures], float]) -> Line:
        values = [seed_interval(results.seeds(arm, lambda m, s=step: number(m["after"][str(s)]))) for step in steps]
        return Line(arm, [step * BATCH for step in steps], values)

    base = seed_interval(results.seeds("epsilon", lambda m: _velocity(m["base"]))).value
    return PageParts(
        method=f"The base: a tiny model trained on ε, {BASE_STEPS} steps of {BATCH} pictures, unweighted, on SDXL's "
        f"betas scaled down so that the last sigma is {float(build_noise_schedule(BASE_SCHEDULE).sigmas[-1]):.2f} = "
        "14.6 · 16/128: on 16 × 16 latents this leaves as much of a flat colour as 14.6 does on SDXL's 128 × 128, so "
        f"what differs is the terminal step and not the size of the latents. Each arm goes on from it for {STEPS} "
        "steps, text encoders too: the base's never needed the words for black and white. Arms without zero "
        "terminal SNR are sampled from that last sigma, as ε-models are; the other from pure noise. 12 Euler steps, "
        "guidance 4.",
        table=rows,
        table_note="Pictures until recovery: after how many trained pictures the velocity loss (mean over σ = "
        f"{SIGMAS[0]} to {SIGMAS[-1]}, held-out pictures, whatever is predicted) is no more than the base's, of looks "
        f"at {', '.join(str(s * BATCH) for s in steps[1:])}; one number a seed. First prediction: error of D(start; "
        "“completely black”), 0 is right, 1 is the answer 0. Black, white: mean brightness of four sampled pictures "
        "a seed. Kernel distance: 32 pictures of held-out captions to held-out pictures.",
        panels=(
            Panel(
                "Itself again?",
                "pictures trained on after the base",
                "mean squared error of the velocity",
                [line(arm, _velocity) for arm in ARMS],
                level=(base, "the base"),
                y_log=True,
            ),
            Panel(
                "Black",
                "pictures trained on after the base",
                "mean brightness of “completely black”",
                [line(arm, _black) for arm in ARMS],
                share=True,
            ),
        ),
        plot_says="Velocity loss and brightness of black against pictures trained on, by arm.",
        conclusion="\n".join(_sentences(results)),
        at_full_size="SDXL was trained for far longer than this base, so it is further from where v-training leads, "
        "and the report's half hour of 256 GPUs is some hundred thousand pictures, not six thousand. The first "
        "prediction's error and black's brightness depend on the schedule and on what the prediction can express, "
        "not on size: ε cannot say what is in pure noise at any size, and its last sigma was matched here. With "
        "longer training v without zero terminal SNR keeps its floor: what the noise at the last sigma tells of "
        "brightness is not known at the start of sampling.",
    )


def _sentences(results: Results) -> list[str]:
    last = str(STEPS)
    sentences = []
    for arm in ARMS:
        if arm == "v-ztsnr":
            continue
        black = paired(*(results.seeds(a, lambda m: _black(m["after"][last])) for a in (arm, "v-ztsnr")))
        velocity = paired(*(results.seeds(a, lambda m: _velocity(m["after"][last])) for a in (arm, "v-ztsnr")))
        sentences.append(
            f"- `{arm}` beside `v-ztsnr`, after {STEPS * BATCH} pictures: black "
            f"{difference(black, 'brighter', 'darker')}; velocity loss {difference(velocity, 'higher', 'lower', 4)}."
        )
    ranked = sorted(ARMS, key=lambda arm: seed_interval(results.seeds(arm, lambda m: _black(m["after"][last]))).value)
    return [*sentences, "", f"Darkest black first: {', '.join(f'`{arm}`' for arm in ranked)}."]


def recovery_words(results: Results, arm: str) -> str:
    found = [_recovery(measures) for _, measures in sorted(results.of[arm].items())]
    return ", ".join("–" if pictures is None else str(pictures) for pictures in found)


def _recovery(measures: Measures) -> int | None:
    """Pictures trained on when the velocity loss was first no more than the base's; None if it never was."""
    wanted = _velocity(measures["base"])
    steps = [step for step in map(int, measures["after"]) if step]
    return next((step * BATCH for step in steps if _velocity(measures["after"][str(step)]) <= wanted), None)


def _first(look: Measures) -> float:
    return float(look["first_prediction"])


def _black(look: Measures) -> float:
    return float(look["brightness"]["black"])


def _white(look: Measures) -> float:
    return float(look["brightness"]["white"])


def _velocity(look: Measures) -> float:
    return float(look["velocity_loss"])


def _kernel(look: Measures) -> float:
    return float(look["kernel"])


UPTRAINING = Study(
    name="uptraining",
    title="An ε-trained model, up-trained five ways",
    question="The report turns SDXL, trained on ε, into a v model that starts from pure noise. How soon is the model "
    "itself again, and which change gives it black?",
    arms={name: arm.words for name, arm in ARMS.items()},
    settings={
        "base_steps": BASE_STEPS,
        "steps": STEPS,
        "text_encoders": "trained",
        "sampling_steps": 12,
        "guidance": 4.0,
        "pictures": 32,
        "colours": SAMPLED,
    },
    data=(DATA,),
    measure=_measure,
    page=_page,
)
