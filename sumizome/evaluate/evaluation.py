"""What a model is worth, in numbers with intervals: colours, tags, distance from the data, loss by timestep, guidance.

Owns which pictures are drawn and what is asked of them; the numbers are `scores`', `distances`' and `classifier`'s.
The invariant: every model is asked for the same prompts, canvases and seeds, so that N models can be compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sumizome.data.latents import open_latents
from sumizome.data.loader import build_loader
from sumizome.diffusion.loss import LossConfig, build_loss
from sumizome.diffusion.schedule import build_noise_schedule
from sumizome.errors import ShardError
from sumizome.evaluate.candidates import Candidate
from sumizome.evaluate.classifier import TagClassifier, train_classifier
from sumizome.evaluate.config import EvaluateConfig
from sumizome.evaluate.distances import frechet_distance, kernel_distance
from sumizome.evaluate.reference import Reference, fits, load_reference
from sumizome.evaluate.scores import (
    COLOURS,
    Images,
    bootstrap,
    brightness,
    colour_error,
    jackknife,
    proportion,
    saturation,
    sharpness,
)
from sumizome.inference import PictureRequest, SamplingConfig, draw_pictures, native_canvas
from sumizome.models.vae import latent_statistics
from sumizome.models.vision_features import load_vision_features
from sumizome.train.step import Objective
from sumizome.train.validation import loss_of, losses_by_timestep

__all__ = [
    "FeatureSpace",
    "Told",
    "data_facts",
    "evaluate_model",
    "prepare_data",
    "tag_recall",
]

Told = Callable[[str], None]


@dataclass(frozen=True)
class FeatureSpace:
    """Where distances are measured, and what it is called: not Inception's, unless that is what it holds."""

    name: str
    of: Callable[[Sequence[Images]], np.ndarray]


def evaluate_model(
    candidate: Candidate,
    config: EvaluateConfig,
    reference: Reference | None,
    classifier: TagClassifier | None,
    features: FeatureSpace | None,
    told: Told,
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """One model's numbers as JSON holds them, and some of the pictures: of each colour, and of captions."""
    told(f"{candidate.name}: colours")
    colours, shown = _colours(candidate, config)
    facts: dict[str, Any] = {
        "name": candidate.name,
        "path": str(candidate.path),
        "step": candidate.step,
        "prediction_type": candidate.model.prediction_type,
        "zero_terminal_snr": candidate.model.schedule_config.zero_terminal_snr,
        **colours,
        **dict.fromkeys(("tags", "distance", "guidance", "validation")),
    }
    if reference is not None:
        told(f"{candidate.name}: captions of the data")
        drawn, places = _captions(candidate, reference, config)
        shown = {**shown, "captions": drawn}
        arrays = [_array(image) for image in drawn]
        if classifier is not None:
            facts["tags"] = tag_recall(classifier, arrays, [reference.tag_lists[place] for place in places])
        if features is not None:
            facts["distance"] = _distances(features, arrays, reference, places)
        told(f"{candidate.name}: guidance")
        facts["guidance"] = _guidance(candidate, reference, config)
        if fits(reference.cache, candidate.model.vae):
            told(f"{candidate.name}: loss by timestep")
            facts["validation"] = _validation(candidate, reference, config)
    return facts, shown


def data_facts(reference: Reference, classifier: TagClassifier, features: FeatureSpace) -> dict[str, Any]:
    """What is measured of the data itself: the classifier's accuracy, and what real pictures get in each measure."""
    test = [reference.images[place] for place in reference.test.tolist()]
    calibration = features.of([reference.images[place] for place in reference.calibration.tolist()])
    real = features.of(test)
    skills = classifier.skills.values()
    return {
        "pictures": {part: len(getattr(reference, part)) for part in ("train", "calibration", "test")},
        "features": features.name,
        "classifier": {
            "tags_told": len(skills),
            "tags_tried": len(classifier.tags),
            "mean_balanced_accuracy": float(np.mean([s.balanced_accuracy for s in skills])) if skills else None,
            "skills": [{**asdict(skill), "balanced_accuracy": skill.balanced_accuracy} for skill in skills],
        },
        "recall": tag_recall(classifier, test, [reference.tag_lists[place] for place in reference.test.tolist()]),
        "frechet": asdict(jackknife(lambda rows: frechet_distance(rows, calibration), real)),
        "kernel": asdict(jackknife(lambda rows: kernel_distance(rows, calibration), real)),
        "saturation": float(np.mean([saturation(image)[0] for image in test])),
        "sharpness": float(np.mean([sharpness(image)[0] for image in test])),
    }


def tag_recall(
    classifier: TagClassifier, images: Sequence[Images], tag_lists: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Which of the asked tags are found: over pictures, by picture, by tag, and by chance.

    Chance: the same pictures held against the tags of the next one. A picture has no part (None) if none of its
    tags can be told.
    """
    found = classifier.found(images)
    asked = [[tag for tag in dict.fromkeys(tags) if tag in found] for tags in tag_lists]
    by_tag = []
    for tag, hits in found.items():
        wanted = np.array([tag in tags for tags in asked])
        if wanted.any():
            by_tag.append(
                {
                    "tag": tag,
                    "recall": asdict(proportion(hits[wanted])),
                    "found_unasked": float(hits[~wanted].mean()) if (~wanted).any() else None,
                    "real": classifier.skills[tag].recall,
                }
            )

    def by_picture(shift: int) -> list[float | None]:
        tags_of = [asked[(place + shift) % len(asked)] for place in range(len(images))]
        return [float(np.mean([found[tag][n] for tag in tags])) if tags else None for n, tags in enumerate(tags_of)]

    each = by_picture(0)
    own, shifted = ([share for share in shares if share is not None] for shares in (each, by_picture(1)))
    return {
        "recall": asdict(bootstrap(own)) if own else None,
        "chance": asdict(bootstrap(shifted)) if shifted else None,
        "by_picture": each,
        "by_tag": sorted(by_tag, key=lambda row: -row["recall"]["count"]),
    }


def _colours(candidate: Candidate, config: EvaluateConfig) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """`colours`, a row each, and `colour_error`, the mean over all of them; and the pictures of each."""
    base = PictureRequest("", canvas=native_canvas(candidate.model), sampling=config.sampling)
    facts, shown, errors = [], {}, []
    for colour in config.colours:
        requests = [
            replace(base, prompt=config.colour_prompt.format(colour), seed=seed) for seed in range(config.seeds)
        ]
        images = _draw(candidate, requests, config)
        pixels = np.stack([np.asarray(image) for image in images])
        errors.append(colour_error(pixels, COLOURS[colour]))
        facts.append(
            {
                "colour": colour,
                "prompt": requests[0].prompt,
                "error": asdict(bootstrap(errors[-1])),
                "errors": errors[-1].tolist(),
                "brightness": asdict(bootstrap(brightness(pixels))),
                "wanted_brightness": float(brightness(np.array(COLOURS[colour], np.uint8).reshape(1, 1, 1, 3))[0]),
            }
        )
        shown[colour] = images
    # A seed is drawn again with all of its colours: they share their noise.
    whole = asdict(bootstrap(np.mean(errors, axis=0)))
    return {"colours": facts, "colour_error": whole}, shown


def _captions(
    candidate: Candidate, reference: Reference, config: EvaluateConfig
) -> tuple[list[Image.Image], list[int]]:
    """Pictures drawn from captions of the third part of the data, and which places those are."""
    places = reference.test[: config.pictures].tolist()
    # Those of one canvas together, so that they are drawn in batches.
    places.sort(key=lambda place: reference.canvases[place])
    return _draw(candidate, _caption_requests(reference, places, config.sampling), config), places


def _caption_requests(reference: Reference, places: Sequence[int], sampling: SamplingConfig) -> list[PictureRequest]:
    return [
        PictureRequest(
            ", ".join(reference.tag_lists[place]), canvas=reference.canvases[place], seed=place, sampling=sampling
        )
        for place in places
    ]


def _draw(candidate: Candidate, requests: Sequence[PictureRequest], config: EvaluateConfig) -> list[Image.Image]:
    return [p.image for p in draw_pictures(candidate.model, requests, batch_size=8, max_chunks=config.max_chunks)]


def _distances(
    features: FeatureSpace, arrays: Sequence[Images], reference: Reference, places: Sequence[int]
) -> dict[str, Any]:
    """From the second part of the data; beside it, what the real pictures of the very same captions get."""
    calibration = features.of([reference.images[place] for place in reference.calibration.tolist()])
    drawn, real = features.of(arrays), features.of([reference.images[place] for place in places])
    return {
        "frechet": asdict(jackknife(lambda rows: frechet_distance(rows, calibration), drawn)),
        "kernel": asdict(jackknife(lambda rows: kernel_distance(rows, calibration), drawn)),
        "real_frechet": frechet_distance(real, calibration),
        "real_kernel": kernel_distance(real, calibration),
        "reference_pictures": len(calibration),
    }


def _guidance(candidate: Candidate, reference: Reference, config: EvaluateConfig) -> list[dict[str, Any]]:
    places = reference.test[: config.guidance_pictures].tolist()
    places.sort(key=lambda place: reference.canvases[place])
    facts = []
    for scale in config.guidance_scales:
        guidance = replace(config.sampling.guidance, guidance_scale=scale)
        sampling = replace(config.sampling, guidance=guidance)
        images = [_array(i) for i in _draw(candidate, _caption_requests(reference, places, sampling), config)]
        facts.append(
            {
                "guidance_scale": scale,
                "saturation": asdict(bootstrap([float(saturation(image)[0]) for image in images])),
                "sharpness": asdict(bootstrap([float(sharpness(image)[0]) for image in images])),
            }
        )
    return facts


@torch.no_grad()
def _validation(candidate: Candidate, reference: Reference, config: EvaluateConfig) -> dict[str, Any]:
    """Mean squared error of the velocity at each timestep, over held-out pictures at noise that never changes.

    Whatever the network predicts, its error is told as that of the velocity it amounts to: ε's divided by ᾱ, x₀'s by
    1 − ᾱ. So models of different prediction types can be compared.
    """
    model = candidate.model
    schedule = build_noise_schedule(model.schedule_config)
    objective = Objective(schedule, model.prediction_type, build_loss(LossConfig(), schedule, model.prediction_type))
    statistics = latent_statistics(model.vae)
    cache = reference.cache.normalised_by(statistics.mean, statistics.std)
    count = min(config.validation_count, len(cache.index.pictures()) // 20)
    count = min(count, candidate.held_out or count)
    loader = build_loader(cache, seed=0, micro_batch_size=16, validation_count=count)
    losses_at: dict[int, list[Tensor]] = {t: [] for t in config.timesteps if 0 <= t < schedule.num_timesteps}
    for batch in loader.validation_batches(16):
        of_batch = losses_by_timestep(model, loss_of(model, objective), batch, losses_at, config.max_chunks)
        for t, each in of_batch:
            losses_at[t].append(each)
    facts = []
    for t, losses in losses_at.items():
        alpha = float(schedule.alphas_cumprod[t])
        as_velocity = {"epsilon": alpha, "sample": 1 - alpha, "v_prediction": 1.0}[model.prediction_type]
        values = torch.cat(losses).double().cpu().numpy() / as_velocity
        facts.append({"timestep": t, "loss": asdict(bootstrap(values))})
    # Of other data the pictures of least hash are others: what a run held out of its own says nothing of these.
    same_data = None if candidate.trained_on is None else candidate.trained_on == cache.fingerprint.digest
    known = bool(same_data) and candidate.held_out is not None
    return {"pictures": count, "same_data": same_data, "known_held_out": known, "by_timestep": facts}


def _array(image: Image.Image) -> Images:
    return np.asarray(image)[None]


def prepare_data(
    latents: Path, candidate: Candidate, config: EvaluateConfig, *, epochs: int, features: Path | None, told: Told
) -> tuple[Reference, TagClassifier, FeatureSpace]:
    """The data's pictures, decoded by the candidate's VAE, the classifier trained on them, and the feature space.

    Raises: ShardError where another VAE made the latents; ConfigError, ModelError.
    """
    vae = candidate.model.vae
    cache = open_latents(latents)
    if not fits(cache, vae):
        raise ShardError(
            f"{latents} was made with another VAE than that of {candidate.path}; put the model first whose VAE made "
            f"them (`{cache.plan.command}`)"
        )
    told("decoding the data")
    reference = load_reference(cache, vae, held_out=config.held_out, train_pictures=config.train_pictures)
    classifier = train_classifier(
        reference.images,
        reference.tag_lists,
        (reference.train, reference.calibration, reference.test),
        epochs=epochs,
        on_step=lambda done, total: told(f"training the classifier: {done} of {total}"),
    )
    if features is None:
        return reference, classifier, FeatureSpace("a small network trained on this data's tags", classifier.features)
    of = load_vision_features(features, vae.device)
    return (
        reference,
        classifier,
        FeatureSpace(f"the model in {features.name}", lambda arrays: of([Image.fromarray(a[0]) for a in arrays])),
    )
