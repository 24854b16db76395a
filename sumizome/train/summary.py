"""How a model was trained, in the words that programs show: kohya's `ss_*` metadata, and one JSON object of our own.

Owns what an exported file tells of its run: steps, samples seen, what the latents were made from, schedule, loss,
resolution. Names of files only, never paths; nothing that is not in the run's own records.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sumizome.data.latent_plan import CachePlan, load_plan
from sumizome.errors import ShardError
from sumizome.settings import as_mapping
from sumizome.train.checkpoint import checkpoint_facts
from sumizome.train.config import TrainConfig
from sumizome.train.metrics import read_metrics
from sumizome.train.run_dir import read_run_config
from sumizome.train.stages import Span, samples_before, span_at

__all__ = ["TRAINING_KEY", "TrainingSummary", "training_summary"]

TRAINING_KEY = "sumizome.training"
"""Metadata key of our own summary, a JSON object."""


@dataclass(frozen=True)
class TrainingSummary:
    """What an exported file tells of its run."""

    metadata: dict[str, str]
    resolution: tuple[int, int] | None
    """(height, width) px of the bucket nearest to a square; None where the latents are gone."""


def training_summary(run_dir: Path, step: int, weights: str) -> TrainingSummary:
    """The summary of the run's checkpoint of `step`, whose weights ("ema" or "raw") are exported.

    Raises: CheckpointError when `run_dir` holds no run, or no such checkpoint.
    """
    config = read_run_config(run_dir)
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["step"] <= step]
    facts = checkpoint_facts(run_dir / "checkpoints" / f"step-{step:08d}")
    stage = span_at(config.spans(), step - 1)
    plan = _latents_plan(stage, facts)
    ours = _ours(config, records, facts, plan, step, weights)
    metadata = {**_kohya(config, stage, ours, plan, run_dir), TRAINING_KEY: json.dumps(ours)}
    return TrainingSummary(metadata, _squarest(plan) if plan else None)


def _squarest(plan: CachePlan) -> tuple[int, int]:
    """The (height, width) px of the bucket nearest to a square."""
    height, width = max(plan.fingerprint.buckets, key=lambda bucket: min(bucket) / max(bucket))
    return height, width


def _latents_plan(stage: Span, facts: Mapping[str, Any]) -> CachePlan | None:
    """What the stage's latents hold, if they are still there and still those that it was trained on."""
    try:
        plan = load_plan(Path(stage.latents))
    except ShardError:
        return None
    of_stages = facts.get("latents_of_stages", [facts.get("latents")])
    trained_on = of_stages[stage.number] if stage.number < len(of_stages) else None
    return plan if plan.fingerprint.digest == trained_on else None


def _ours(
    config: TrainConfig,
    records: list[dict[str, Any]],
    facts: Mapping[str, Any],
    plan: CachePlan | None,
    step: int,
    weights: str,
) -> dict[str, Any]:
    spans = config.spans()
    begun = [span for span in spans if span.first < step]
    square = _squarest(plan) if plan else None
    summary: dict[str, Any] = {
        "steps": step,
        "samples_seen": samples_before(spans, step),
        "global_batch_size": begun[-1].images_per_step,
        "stages": [_as_told(span, step, config.optim.lr) for span in begun] if len(spans) > 1 else None,
        "weights": weights,
        "base_model": config.model.name,
        "base_unet_sha256": facts.get("base_model", {}).get("unet"),
        "latents_fingerprint": facts.get("latents"),
        "images": plan.images if plan else None,
        "resolution": f"{square[1]}x{square[0]}" if square else None,
        "buckets": len(plan.fingerprint.buckets) if plan else None,
        "prediction_type": config.prediction_type,
        "timestep_sampling": config.timestep_sampling,
        "precision": config.precision,
        "seed": config.seed,
        "loss_at_end": _last(records, "loss"),
        "validation_loss_at_end": _last(records, "validation_loss"),
    }
    for part in ("schedule", "loss", "optim", "ema", "captions", "tag_weights", "latent_statistics"):
        if hasattr(config, part):
            summary[part] = _without_paths(as_mapping(getattr(config, part)))
    return {key: value for key, value in summary.items() if value is not None}


def _as_told(span: Span, step: int, lr: float) -> dict[str, Any]:
    """A stage as far as it has come."""
    steps = min(span.last, step) - span.first
    return {"name": span.name, "steps": steps, "global_batch_size": span.images_per_step, "lr": lr * span.lr_factor}


def _last(records: list[dict[str, Any]], key: str) -> Any:
    return next((record[key] for record in reversed(records) if key in record), None)


def _without_paths(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without unset ones; a path is shortened to its name, which tells nothing of the machine."""
    return {
        key: Path(value).name if isinstance(value, str) and "/" in value else value
        for key, value in mapping.items()
        if value is not None
    }


_OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "adafactor": "Adafactor"}


def _kohya(
    config: TrainConfig, stage: Span, ours: Mapping[str, Any], plan: CachePlan | None, run_dir: Path
) -> dict[str, str]:
    """The keys that A1111 and its kin show, as the last stage has them. None of a network (LoRA), or readers would take
    the model for one."""
    told: dict[str, Any] = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": config.model.name,
        "ss_output_name": run_dir.name,
        "ss_steps": ours["steps"],
        "ss_max_train_steps": config.steps,
        "ss_seed": config.seed,
        "ss_learning_rate": config.optim.lr * stage.lr_factor,
        "ss_unet_lr": config.optim.lr * stage.lr_factor,
        "ss_text_encoder_lr": config.optim.text_encoder_lr * stage.lr_factor,
        "ss_lr_scheduler": config.optim.lr_schedule,
        "ss_lr_warmup_steps": config.optim.warmup_steps,
        "ss_optimizer": _OPTIMIZERS[config.optim.name],
        "ss_batch_size_per_device": stage.micro_batch_size,
        "ss_total_batch_size": ours["global_batch_size"],
        "ss_gradient_accumulation_steps": stage.micro_batches_per_step,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_mixed_precision": config.precision,
        "ss_max_token_length": 75 * config.max_chunks,
        "ss_min_snr_gamma": None if config.loss.weighting == "uniform" else config.loss.gamma,
        "ss_zero_terminal_snr": config.schedule.zero_terminal_snr,
        "ss_v_parameterization": config.prediction_type == "v_prediction",
        "ss_training_comment": f"Sumizome, {ours['samples_seen']:,} samples seen, {ours['weights']} weights",
    }
    if plan is not None:
        square = _squarest(plan)
        told |= {
            "ss_num_train_images": plan.images,
            "ss_resolution": f"({square[1]}, {square[0]})",
            "ss_enable_bucket": True,
            "ss_bucket_info": json.dumps(
                {"buckets": {str(i): {"resolution": [w, h]} for i, (h, w) in enumerate(plan.fingerprint.buckets)}}
            ),
        }
    return {key: str(value) for key, value in told.items() if value is not None}
