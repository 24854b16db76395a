"""What a merged file says of itself: its parents and their weights, and of their metadata what still holds.

Owns those words, and with them ModelSpec's rule for merges (`modelspec.merged_from`). Marks, dtypes and the date are
`mend_words`', as of every copy.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sumizome.data.listing import printable
from sumizome.inspection import Findings

__all__ = ["MERGE_KEY", "merged_metadata", "with_other_vae"]

MERGE_KEY = "sumizome.merge"
"""The parents, as JSON: name, title, hash and weight of each, and of a parent that is a merge its own parents."""

_SHARED = ("resolution", "tags", "trigger_phrase", "usage_hint", "encoder_layer", "timestep_range", "preprocessor")
"""Of ModelSpec's fields, those that hold for a merge if they hold for every parent. How a parent was trained, who made
it, its date, hash, thumbnail and description do not, nor does anything that another program has written beside them."""

_VAE_OF = " The VAE is that of "


def merged_metadata(parents: Sequence[tuple[Findings, float]]) -> dict[str, str]:
    """What the merge Σ weight·parent says, beside what every copy does; its VAE, if it has one, is the first's."""
    every = [findings.metadata for findings, _ in parents]
    shared = {
        key: every[0][key]
        for key in (f"modelspec.{field}" for field in _SHARED)
        if every[0].get(key) and all(metadata.get(key) == every[0][key] for metadata in every)
    }
    # It binds whatever is made of a parent, whoever else agrees; a parent that is a merge has a list of its own.
    licences = [part.strip() for metadata in every for part in metadata.get("modelspec.license", "").split(";")]
    licence = "; ".join(dict.fromkeys(filter(None, licences)))
    titles = [_title(findings) for findings, _ in parents]
    recipe: dict[str, Any] = {"models": [_told(findings, weight) for findings, weight in parents]}
    description = f"A merge: {_sum(titles, [weight for _, weight in parents])}."
    if any(part.name == "vae" for part in parents[0][0].components):
        recipe["vae"] = printable(parents[0][0].path.name)
        description += f"{_VAE_OF}{titles[0]}."
    return {
        **shared,
        **({"modelspec.license": licence} if licence else {}),
        # A list whose items are parted by commas.
        "modelspec.merged_from": ", ".join(" ".join(title.replace(",", " ").split()) for title in titles),
        "modelspec.description": description,
        MERGE_KEY: json.dumps(recipe),
    }


def with_other_vae(metadata: Mapping[str, str], vae: Path) -> dict[str, str]:
    """The metadata of a copy that gets another VAE: what a merge says of its own would no longer be true."""
    told = dict(metadata)
    before, found, _ = told.get("modelspec.description", "").rpartition(_VAE_OF)
    if MERGE_KEY in told and found:
        told["modelspec.description"] = f"{before}{_VAE_OF}{printable(vae.name.removesuffix('.safetensors'))}."
    recipe = _recipe(metadata)
    if isinstance(recipe, dict):
        told[MERGE_KEY] = json.dumps({**recipe, "vae": printable(vae.name)})
    return told


def _sum(titles: Sequence[str], weights: Sequence[float]) -> str:
    terms = (f"{'-' if w < 0 else '+'} {abs(w):.4g} × {title}" for title, w in zip(titles, weights, strict=True))
    return " ".join(terms).removeprefix("+ ")


def _told(findings: Findings, weight: float) -> dict[str, Any]:
    """A parent by what it can be found by; names of files stand in it, never their paths."""
    metadata = findings.metadata
    names = {
        "name": findings.path.name,
        "title": metadata.get("modelspec.title"),
        "hash_sha256": metadata.get("modelspec.hash_sha256"),
    }
    told = {key: printable(value) for key, value in names.items() if value is not None}
    own = _own_merge(metadata)
    return {**told, "weight": weight, **({} if own is None else {"merge": own})}


_MOST_OF_A_RECIPE = 20_000
"""Characters: merges of merges would double it each time, and a header has no room for a thousand ancestors."""


def _own_merge(metadata: Mapping[str, str]) -> Any:
    """The recipe of a parent that is itself a merge; one that is too long or cannot be read is left out."""
    return _recipe(metadata) if len(metadata.get(MERGE_KEY, "")) <= _MOST_OF_A_RECIPE else None


def _recipe(metadata: Mapping[str, str]) -> Any:
    """As JSON has it; None if there is none or it cannot be read."""
    try:
        return json.loads(metadata.get(MERGE_KEY, "null"))
    except (ValueError, RecursionError):
        return None


def _title(findings: Findings) -> str:
    """What a parent is called, in one line that can be printed."""
    path = findings.path
    title = findings.metadata.get("modelspec.title") or (path.name if findings.layout == "folder" else path.stem)
    return printable(" ".join(title.split()))
