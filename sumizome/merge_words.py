"""What a merged file says of itself: its parents and their weights, and of their metadata what still holds.

Owns those words, and with them ModelSpec's rule for merges (`modelspec.merged_from`). Marks, dtypes and the date are
`mend_words`', as of every copy.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sumizome.inspection import Findings

__all__ = ["MERGE_KEY", "merged_metadata"]

MERGE_KEY = "sumizome.merge"
"""The parents, as JSON: name, title, hash and weight of each, and of a parent that is a merge its own parents."""

_SHARED = ("resolution", "tags", "trigger_phrase", "usage_hint", "encoder_layer", "timestep_range", "preprocessor")
"""Of ModelSpec's fields, those that hold for a merge if they hold for every parent. How a parent was trained, who made
it, its date, hash, thumbnail and description do not, nor does anything that another program has written beside them."""


def merged_metadata(parents: Sequence[tuple[Findings, float]]) -> dict[str, str]:
    """What the merge Σ weight·parent says, beside what every copy does; its VAE, if it has one, is the first's."""
    every = [findings.metadata for findings, _ in parents]
    shared = {
        key: every[0][key]
        for key in (f"modelspec.{field}" for field in _SHARED)
        if every[0].get(key) and all(metadata.get(key) == every[0][key] for metadata in every)
    }
    licenses = dict.fromkeys(metadata.get("modelspec.license") for metadata in every)
    licence = "; ".join(filter(None, licenses))  # it binds whatever is made of a parent, whoever else agrees
    titles = [_title(findings) for findings, _ in parents]
    recipe: dict[str, Any] = {"models": [_told(findings, weight) for findings, weight in parents]}
    description = f"A merge: {_sum(titles, [weight for _, weight in parents])}."
    if any(part.name == "vae" for part in parents[0][0].components):
        recipe["vae"] = parents[0][0].path.name
        description += f" The VAE is that of {titles[0]}."
    return {
        **shared,
        **({"modelspec.license": licence} if licence else {}),
        # A list whose items are parted by commas.
        "modelspec.merged_from": ", ".join(" ".join(title.replace(",", " ").split()) for title in titles),
        "modelspec.description": description,
        MERGE_KEY: json.dumps(recipe),
    }


def _sum(titles: Sequence[str], weights: Sequence[float]) -> str:
    terms = (f"{'-' if w < 0 else '+'} {abs(w):.4g} × {title}" for title, w in zip(titles, weights, strict=True))
    return " ".join(terms).removeprefix("+ ")


def _told(findings: Findings, weight: float) -> dict[str, Any]:
    """A parent by what it can be found by; names of files stand in it, never their paths."""
    metadata = findings.metadata
    told = {
        "name": findings.path.name,
        "title": metadata.get("modelspec.title"),
        "hash_sha256": metadata.get("modelspec.hash_sha256"),
        "weight": weight,
        "merge": _own_merge(metadata),
    }
    return {key: value for key, value in told.items() if value is not None}


_MOST_OF_A_RECIPE = 20_000
"""Characters: merges of merges would double it each time, and a header has no room for a thousand ancestors."""


def _own_merge(metadata: Mapping[str, str]) -> Any:
    """The recipe of a parent that is itself a merge; one that is too long or cannot be read is left out."""
    recipe = metadata.get(MERGE_KEY, "null")
    try:
        return json.loads(recipe) if len(recipe) <= _MOST_OF_A_RECIPE else None
    except (ValueError, RecursionError):
        return None


def _title(findings: Findings) -> str:
    path = findings.path
    return findings.metadata.get("modelspec.title") or (path.name if findings.layout == "folder" else path.stem)
