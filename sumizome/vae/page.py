"""The page of decoders beside each other. Owns what is shown; every number is in the JSON as well."""

from collections.abc import Mapping, Sequence
from typing import Any

from sumizome.evaluate.evaluation_page import sheet_uri
from sumizome.evaluate.labelled import labelled_grid
from sumizome.report.page import render_page
from sumizome.vae.evaluation import Close
from sumizome.vae.scores import MEASURES

__all__ = ["decoder_page"]

_TIMES = 4


def decoder_page(facts: Mapping[str, Any], closes: Sequence[Close]) -> str:
    """The page of `facts`, as the JSON has them."""
    names = [row["name"] for row in facts["rows"]]
    sheet = None
    if closes:
        side = _TIMES * max(max(image.size) for close in closes for image in close.pictures)
        sheet = sheet_uri(
            labelled_grid(
                [close.pictures for close in closes],
                [close.sample_id for close in closes],
                ["original", *names],
                least_side=side,
            )
        )
    return render_page(
        "decoders.html.j2",
        {
            "title": "VAE decoders",
            "facts": facts,
            "rows": facts["rows"],
            "measures": [(name, MEASURES[name]) for name in facts["measures"]],
            "sheet": sheet,
        },
    )
