"""What the base model knew before the run: its loss by timestep, read as what it itself predicts; and before and after.

An epsilon model that is trained on as a v model answers wrongly at first only because it is asked in another language.
Here its answer is translated: the network is given the noised latents at the timestep of its own schedule that has
their sigma, and its output becomes the run's through the clean latents that it stands for. Where the base's schedule
ends before the run's (SDXL's at sigma 14.6), there is no such timestep, and no number.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sumizome.data.loader import TrainBatch
from sumizome.diffusion.prediction import PredictionType, denoised_from_output, output_from_denoised, training_target
from sumizome.diffusion.schedule import NoiseSchedule
from sumizome.errors import CheckpointError
from sumizome.files import write_atomically
from sumizome.models.conditioning import UNetConditioning, apply_unet
from sumizome.models.sdxl import SDXLModel
from sumizome.shapes import Latents, PerSample, Timesteps
from sumizome.train.metrics import read_metrics
from sumizome.train.step import Objective
from sumizome.train.validation import SampleLoss

__all__ = ["base_loss", "readable_timesteps", "write_loss_table"]


def readable_timesteps(schedule: NoiseSchedule, base: NoiseSchedule, timesteps: Sequence[int]) -> list[int]:
    """Those of the run's timesteps whose noise the base's schedule reaches."""
    return [t for t in timesteps if float(schedule.sigmas[t]) <= float(base.sigmas[-1])]


def base_loss(model: SDXLModel, objective: Objective, base_type: PredictionType, base: NoiseSchedule) -> SampleLoss:
    """The run's unweighted loss of the base's answers."""

    def loss(batch: TrainBatch, timesteps: Timesteps, noise: Latents, conditioning: UNetConditioning) -> PerSample:
        schedule, device = objective.schedule, model.device
        latents = batch.latents.to(device)
        noise = noise.to(device)
        alphas_cumprod = schedule.alphas_cumprod_of(timesteps)
        noised_latents = schedule.add_noise(latents, noise, timesteps)
        own_timesteps = base.timestep_of(schedule.sigmas[timesteps])
        answer = apply_unet(model.unet, noised_latents, own_timesteps.to(device), conditioning).float()
        denoised = denoised_from_output(base_type, answer, noised_latents, alphas_cumprod)
        output = output_from_denoised(objective.prediction_type, denoised, noised_latents, alphas_cumprod)
        target = training_target(objective.prediction_type, latents, noise, alphas_cumprod)
        return (output - target).square().flatten(1).mean(1)

    return loss


def write_loss_table(run_dir: Path, step: int, losses: dict[str, float]) -> Path:
    """Writes run_dir/loss_by_timestep.txt: the base's loss, that of step 0, and that of `step`, side by side."""
    first = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["step"] == 0]
    base: dict[str, Any] = next((record["base_loss"] for record in first if "base_loss" in record), {})
    start: dict[str, Any] = next((record["validation_loss"] for record in first if "validation_loss" in record), {})
    columns = {"base, as it predicts": base, "at the start": start, f"at step {step}": losses}
    columns = {name: values for name, values in columns.items() if values}
    lines = ["Loss of the held-out pictures by timestep, averaged weights (t = 999 is pure noise):", ""]
    lines += ["   t  " + "".join(f"{name:>22}" for name in columns) + "   at the end, as a bar"]
    highest = max(losses.values(), default=0.0) or 1.0
    for t in sorted(losses, key=int):
        cells = "".join(_cell(values.get(t)) for values in columns.values())
        lines.append(f"{t:>4}  {cells}   {'█' * round(30 * losses[t] / highest)}")
    if base:
        lines += ["", "–: the base's schedule does not reach that noise; it has no answer there."]
    path = run_dir / "loss_by_timestep.txt"
    text = "\n".join(lines) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), failure=CheckpointError)
    return path


def _cell(value: float | None) -> str:
    return f"{'–':>22}" if value is None else f"{value:>22.4f}"
