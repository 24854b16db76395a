"""The page of an evaluation: N models side by side. Owns what is shown; every number is in the JSON as well."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image

from sumizome.evaluate.labelled import labelled_grid
from sumizome.evaluate.paired import difference_in_words
from sumizome.evaluate.plots import Series, line_chart
from sumizome.evaluate.scores import COLOURS, Interval
from sumizome.report.charts import Chart
from sumizome.report.page import image_uri, render_page

__all__ = ["as_interval", "evaluation_page", "sheet_uri"]

_SHOWN_SEEDS = 4
_PLOTTED = 3
"""Models in a plot: four lines can be told apart, and real pictures are one. The tables have all."""
_SHOWN_CAPTIONS = 12


def as_interval(facts: Mapping[str, Any]) -> Interval:
    """An interval as JSON has it."""
    return Interval(facts["value"], facts["low"], facts["high"], facts["count"])


def sheet_uri(image: Image.Image) -> Markup:
    """A picture as a lossless WebP within the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True)
    return image_uri(buffer.getvalue())


def evaluation_page(facts: Mapping[str, Any], shown: Sequence[Mapping[str, list[Image.Image]]]) -> str:
    """The page of `facts`, as the JSON has them; `shown`: each model's pictures, as `evaluate_model` gives them."""
    models = facts["models"]
    names = [model["name"] for model in models]
    colours = [
        {"name": row["colour"], "prompt": row["prompt"], "wanted": row["wanted_brightness"],
         "of": [model["colours"][place] for model in models]}
        for place, row in enumerate(models[0]["colours"])
    ]  # fmt: skip
    return render_page(
        "evaluate.html.j2",
        {
            "title": "Evaluation: " + ", ".join(names),
            "facts": facts,
            "names": names,
            "models": models,
            "data": facts["data"],
            "beside": _beside_rows(facts["beside_first"]),
            "colours": colours,
            "sheets": [_colour_sheet(pictures) for pictures in shown],
            "captions": [_caption_sheet(pictures) for pictures in shown],
            "tags": _tag_rows(models),
            "charts": _charts(models, facts["data"]),
            "plotted": names[:_PLOTTED],
            "guidance": _guidance_rows(models),
        },
    )


def _beside_rows(beside: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By measure: for each model after the first, in words and with the interval; None where one was not measured."""
    names = {
        "colour_error": "mean colour error",
        "colour_error_black": "colour error of black",
        "colour_error_white": "colour error of white",
        "recall": "recall of tags",
    }
    rows = []
    for what, name in names.items():
        found = [model["differences"].get(what) for model in beside]
        # A recall is a share: points are of a hundred.
        shown = (0.01, 1, " points") if what == "recall" else (1.0, 3, "")
        if any(found):
            of = [it and difference_in_words(as_interval(it), *shown) for it in found]
            count = next(it["count"] for it in found if it)
            rows.append({"name": name, "over": f"{count} {'captions' if what == 'recall' else 'seeds'}", "of": of})
    return rows


def _colour_sheet(pictures: Mapping[str, list[Image.Image]]) -> Markup:
    colours = [name for name in pictures if name != "captions"]
    side = pictures[colours[0]][0].size
    rows = [[Image.new("RGB", side, COLOURS[name]) for name in colours]]
    rows += [[pictures[name][seed] for name in colours] for seed in range(min(_SHOWN_SEEDS, len(pictures[colours[0]])))]
    small = [[image.resize((72, 72), Image.Resampling.LANCZOS) for image in row] for row in rows]
    labels = ["asked for", *(f"seed {seed}" for seed in range(len(rows) - 1))]
    return sheet_uri(labelled_grid(small, labels, colours, least_side=72, least_width=72))


def _caption_sheet(pictures: Mapping[str, list[Image.Image]]) -> Markup | None:
    drawn = pictures.get("captions", [])
    if not drawn:
        return None
    every = max(1, len(drawn) // _SHOWN_CAPTIONS)
    chosen = drawn[::every][:_SHOWN_CAPTIONS]
    for image in chosen:
        image.thumbnail((128, 128))
    return sheet_uri(labelled_grid([chosen], [""], [""] * len(chosen), least_side=64, least_width=0))


def _tag_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tags by how often they were asked for; a model's entry is None where it has none."""
    by_model = [{row["tag"]: row for row in (model.get("tags") or {}).get("by_tag", [])} for model in models]
    order = dict.fromkeys(tag for rows in by_model for tag in rows)
    return [
        {
            "tag": tag,
            "real": next(rows[tag]["real"] for rows in by_model if tag in rows),
            "of": [rows.get(tag) for rows in by_model],
        }
        for tag in order
    ]


def _guidance_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By scale: each model's numbers; every model is asked for the same scales."""
    guided = [model["guidance"] for model in models if model.get("guidance")]
    return [
        {"scale": row["guidance_scale"], "of": [rows[place] for rows in guided]}
        for place, row in enumerate(guided[0] if guided else [])
    ]


def _charts(models: Sequence[Mapping[str, Any]], data: Mapping[str, Any] | None) -> dict[str, Chart | None]:
    charts: dict[str, Chart | None] = dict.fromkeys(("validation", "saturation", "sharpness"))
    validated = [
        Series(m["name"], [(p["timestep"], as_interval(p["loss"])) for p in m["validation"]["by_timestep"]])
        for m in models[:_PLOTTED]
        if m.get("validation")
    ]
    if validated:
        charts["validation"] = line_chart(
            "Loss by timestep", validated, "timestep; 999 is pure noise", "mean squared error of the velocity"
        )
    guided = [model for model in models[:_PLOTTED] if model.get("guidance")]
    for what, unit in (("saturation", "share of full"), ("sharpness", "share of the range")):
        series = [
            Series(m["name"], [(p["guidance_scale"], as_interval(p[what])) for p in m["guidance"]]) for m in guided
        ]
        if series and data is not None:
            scales = [p["guidance_scale"] for p in guided[0]["guidance"]]
            series = [*series, Series("real pictures", [(scale, data[what]) for scale in (scales[0], scales[-1])])]
        if series:
            charts[what] = line_chart(what.capitalize(), series, "guidance scale; 1 = off", unit)
    return charts
