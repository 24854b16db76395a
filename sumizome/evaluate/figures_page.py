"""The page of the figures: each picture or plot, what the report says of it, and its number. Owns what is shown."""

from collections.abc import Sequence

from sumizome.evaluate.evaluation_page import sheet_uri
from sumizome.evaluate.figures import Figure
from sumizome.evaluate.plots import Series, line_chart
from sumizome.report.charts import Chart
from sumizome.report.page import render_page

__all__ = ["figures_page"]


def figures_page(figures: Sequence[Figure], model_name: str) -> str:
    """The page of the figures that were drawn."""
    shown = [
        {
            "key": figure.key,
            "title": figure.title,
            "says": figure.says,
            "number": figure.number,
            "image": None if figure.image is None else sheet_uri(figure.image),
            "charts": _charts(figure),
        }
        for figure in figures
    ]
    return render_page("figures.html.j2", {"title": f"The report's figures on {model_name}", "figures": shown})


def _charts(figure: Figure) -> list[Chart]:
    """The plots of a figure: its own, or those of its numbers."""
    if "charts" in figure.extra:
        return list(figure.extra["charts"])
    if "curves" in figure.extra:
        series = [
            Series(name, [(len(curve) - len(points) + step, mean) for step, (_, mean) in enumerate(points)])
            for curve in [figure.extra["curves"][0]]
            for name, points in zip(("with the terminal step", "without it"), figure.extra["curves"], strict=True)
        ]
        return [line_chart("Brightness of the prediction", series, "step; 0 is pure noise", "0 black, 1 white")]
    if "sigmas" in figure.values:
        series = [
            Series(f"σ_max {start}", list(enumerate(sigmas))) for start, sigmas in figure.values["sigmas"].items()
        ]
        return [line_chart("The first sigmas", series, "step", "σ", ticks=range(5))]
    return []
