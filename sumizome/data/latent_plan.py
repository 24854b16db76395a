"""What made the latents of a folder, and what it is to hold: its fingerprint and its plan, in `latents.json`.

Owns that file and the comparison of fingerprints; the units are `shards`'. The invariant: two folders of one
fingerprint hold the same numbers and tags.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sumizome.data.manifest import tags_by_category
from sumizome.data.sealed_json import digest_of, read_sealed_json, write_sealed_json
from sumizome.errors import ShardError

__all__ = ["DECIDE_NO_LATENT", "CachePlan", "Fingerprint", "differences", "load_plan", "plan_path", "write_plan"]

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides a cache's content: caches of one fingerprint hold the same numbers and tags."""

    vae_digest: str
    """SHA-256 of the VAE's weights and statistics."""
    vae_factor: int
    """Pixels per latent along one side."""
    latent_mean: tuple[float, ...]
    """normalised = (raw − mean) / std, per channel."""
    latent_std: tuple[float, ...]
    buckets: tuple[tuple[int, int], ...]
    """The bucket table, (height, width) in pixels."""
    max_aspect_error: float
    crop: str
    crop_seed: int
    resize: str
    """`canvas.RESIZE_VERSION`."""
    manifest_digest: str
    """Which pictures and tags there are. It decides no latent: those of a picture that stays are kept."""
    background: tuple[int, int, int] = (255, 255, 255)
    """What transparent pictures were composited on."""
    precision: str = "float32"
    """Of the VAE's arithmetic."""
    crops: int = 1
    """Random crops stored of each picture."""
    flip: bool = False
    """Each crop is stored mirrored, too."""
    retries: int = 0
    """Times that rejected pictures were tried again. It decides no latent, but which of the manifest's there are."""

    @property
    def content(self) -> dict[str, Any]:
        """What is written and hashed. Without `retries` where there were none: digests of before stay what they are."""
        return {name: value for name, value in asdict(self).items() if name != "retries" or value}

    @property
    def digest(self) -> str:
        """SHA-256 hex; each unit carries it. A run goes on only with the same."""
        return digest_of(self.content)

    @property
    def latents_digest(self) -> str:
        """SHA-256 hex of what decides the latent of a given picture: all but `DECIDE_NO_LATENT`."""
        return digest_of({name: value for name, value in asdict(self).items() if name not in DECIDE_NO_LATENT})

    @property
    def variants(self) -> int:
        """Latents of each picture."""
        return self.crops * (2 if self.flip else 1)


DECIDE_NO_LATENT = frozenset({"manifest_digest", "retries"})
"""Fields that say which pictures there are, not what is made of one."""

_FIELD_NAMES = {
    "vae_digest": "VAE (its weights or statistics)",
    "vae_factor": "VAE (its downscale factor)",
    "latent_mean": "latent mean",
    "latent_std": "latent scale",
    "buckets": "bucket table (area, step, min_side, max_side)",
    "max_aspect_error": "max_aspect_error",
    "crop": "crop",
    "crop_seed": "crop_seed",
    "resize": "code that resizes",
    "manifest_digest": "manifest (pictures or tags)",
    "background": "background",
    "precision": "precision",
    "crops": "crops",
    "flip": "flip",
    "retries": "count of retries",
}


@dataclass(frozen=True)
class CachePlan:
    """What a latent folder is to hold, written before the first unit."""

    fingerprint: Fingerprint
    images: int
    """Rows of the manifest; every one ends up written or rejected."""
    unit_size: int
    """Pictures in a unit; the last has the rest."""
    command: str
    """What to run to make the folder again, or to finish it."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """tag → category, the manifest's; `manifest_digest` covers it, so it cannot be another's."""
    generation: int = 0
    """Counts the manifests that the folder has been prepared for."""
    kept_units: int = 0
    """The units below this are of earlier generations; this one has its own indexes of them."""
    kept_images: int = 0
    """Pictures whose latents those units hold."""

    @property
    def units(self) -> int:
        return self.kept_units - (self.kept_images - self.images) // self.unit_size

    @property
    def new_units(self) -> range:
        """Those that this generation makes."""
        return range(self.kept_units, self.units)

    @property
    def remedy(self) -> str:
        """What mends a unit, as the end of an error's sentence."""
        return f"run `{self.command}` again: whole units are kept, this one is made anew"

    def rows(self, unit: int) -> range:
        """Which of the pictures that no kept unit holds, in the manifest's order, are those of a new unit."""
        first = (unit - self.kept_units) * self.unit_size
        return range(first, min(self.images - self.kept_images, first + self.unit_size))

    def overlay(self, unit: int) -> int:
        """The generation whose index of the unit counts; 0 = the unit's own."""
        return self.generation if unit < self.kept_units else 0


def plan_path(root: Path, *, finished: bool = True) -> Path:
    """Where the plan of the finished latents lies, or of those that are being prepared."""
    return root / ("latents.json" if finished else "latents.next.json")


def write_plan(root: Path, plan: CachePlan, *, finished: bool = True) -> None:
    """Says what the folder holds, or, not `finished`, what is being prepared in it.

    Raises: DataError if the disk cannot be written.
    """
    told = {"fingerprint": plan.fingerprint.content, "categories": tags_by_category(plan.categories)}
    content = {"format": FORMAT_VERSION, **asdict(plan), **told}
    if not plan.categories:
        del content["categories"]
    write_sealed_json(plan_path(root, finished=finished), content)


def load_plan(root: Path, *, finished: bool = True) -> CachePlan:
    """The plan of the latents at `root`; not `finished`, of those that are being prepared there.

    Raises: ShardError if there is none, it is damaged, or another version wrote it.
    """
    path = plan_path(root, finished=finished)
    if not path.is_file():
        if finished and plan_path(root, finished=False).is_file():
            plan = load_plan(root, finished=False)
            raise ShardError(f"{path} is missing: the latents are not finished; run `{plan.command}` again")
        raise ShardError(f"{root} holds no {path.name}; give a folder that `sumizome prepare` wrote")
    content = read_sealed_json(path, "delete the folder and run `sumizome prepare` again")
    if content.pop("format", None) != FORMAT_VERSION:
        raise ShardError(
            f"{path}: not of format {FORMAT_VERSION}, which this version reads; "
            "run `sumizome prepare` again into another folder"
        )
    try:
        made_by = {key: _as_tuple(value) for key, value in content.pop("fingerprint").items()}
        categories = {tag: name for name, tags in content.pop("categories", {}).items() for tag in tags}
        command = str(content.pop("command"))
        plan = CachePlan(Fingerprint(**made_by), command=command, categories=categories, **content)
        counts = (plan.generation, plan.kept_units, plan.kept_images, plan.images - plan.kept_images)
        if min(plan.images, plan.unit_size) < 1 or min(counts) < 0:
            raise ValueError(f"{plan.images} images in units of {plan.unit_size}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(
            f"{path}: not what `sumizome prepare` writes ({error}); run it again into another folder"
        ) from error
    return plan


def differences(found: Fingerprint, expected: Mapping[str, Any]) -> list[str]:
    """The parts of a fingerprint that are not as expected, in words."""
    return list(dict.fromkeys(_FIELD_NAMES[name] for name, value in expected.items() if getattr(found, name) != value))


def _as_tuple(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
