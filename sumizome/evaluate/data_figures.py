"""The report's figures of the data: square crops against buckets, and latents before and after normalising.

Owns what is counted; nothing is sampled. Sizes are (height, width) in pixels.
"""

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from sumizome.data.buckets import assign_buckets, cover_sizes, crop_share
from sumizome.data.latent_statistics import LATENT_PRESETS, measure_latents
from sumizome.data.latents import LatentCache
from sumizome.evaluate.figures import Figure
from sumizome.evaluate.labelled import labelled_grid
from sumizome.evaluate.plots import Series, line_chart
from sumizome.evaluate.reference import decode_rows
from sumizome.evaluate.scores import bootstrap

__all__ = ["cropped_shares", "crops", "latent_histograms"]

_EXAMPLES = 4
_SIDE = 256
"""px of the longer side of an example"""
_SAMPLED = 512
_BINS = np.linspace(-4, 4, 65)


def cropped_shares(sizes: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of each picture that the table's square cuts off, share that its nearest bucket does).

    `sizes` int64 [n, 2] of the originals; the square has about the table's area.
    """
    side = int(np.sqrt(table.prod(axis=1).max()))
    squares = np.full((len(sizes), 2), side, np.int64)
    nearest = table[assign_buckets(sizes, table).bucket]
    return crop_share(cover_sizes(sizes, squares), squares), crop_share(cover_sizes(sizes, nearest), nearest)


def crops(cache: LatentCache, vae: AutoencoderKL) -> Figure:
    """Figure 8: what a square crop leaves out of pictures that buckets keep."""
    pictures = cache.index.pictures()
    sizes = cache.index.original[pictures].astype(np.int64)
    square, bucketed = cropped_shares(sizes, cache.buckets)
    # One picture of each of the most elongated buckets that have any, both ways.
    canvases = cache.buckets[cache.index.bucket[pictures]].astype(np.float64)
    elongation = np.abs(np.log(canvases[:, 0] / canvases[:, 1]))
    order = np.argsort(-elongation, kind="stable")
    _, first = np.unique(cache.index.bucket[pictures][order], return_index=True)
    examples = order[np.sort(first)][:_EXAMPLES]
    # A square's own crop shows nothing, unless there is nothing else.
    chosen = pictures[examples[elongation[examples] > 0] if elongation.any() else examples]
    whole, cut = [], []
    for array in decode_rows(cache, vae, chosen):
        image = Image.fromarray(array[0])
        factor = max(1, round(_SIDE / max(image.size)))
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        cut.append(image.crop((left, top, left + side, top + side)))
        framed = image.copy()
        box = (left, top, left + side - 1, top + side - 1)
        ImageDraw.Draw(framed).rectangle(box, outline="white", width=3)
        ImageDraw.Draw(framed).rectangle(box, outline="black", width=1)
        whole.append(framed)
    names = ["{} × {} px".format(*cache.buckets[cache.index.bucket[row]].tolist()) for row in chosen.tolist()]
    of_square, of_buckets = bootstrap(square), bootstrap(bucketed)
    return Figure(
        "8",
        "A square crop against buckets",
        "A square crop of a picture that is not square cuts off heads and feet; a bucket of its own aspect keeps them "
        "(report §4.1, figure 8).",
        f"On average a square crop cuts off {of_square.value:.1%} of a picture, the nearest bucket "
        f"{of_buckets.value:.1%}, over {of_square.count} pictures and {len(cache.buckets)} buckets.",
        {"square": vars(of_square), "buckets": vars(of_buckets), "canvases": cache.buckets.tolist()},
        labelled_grid([whole, cut], ["its bucket; framed: the square", "the square crop"], names, least_side=1),
    )


def latent_histograms(cache: LatentCache) -> Figure:
    """Appendix B: each channel of the latents under SDXL's one factor, and under its own mean and deviation."""
    *_, (_, report) = measure_latents(cache)
    measured = report.whole
    sdxl = LATENT_PRESETS["sdxl"]
    rows = np.random.default_rng(0).permutation(cache.index.pictures())[:_SAMPLED]
    parts = []
    for bucket in np.unique(cache.index.bucket[rows]).tolist():
        latents = cache.read(np.sort(rows[cache.index.bucket[rows] == bucket])).numpy()
        parts.append(latents.transpose(1, 0, 2, 3).reshape(latents.shape[1], -1))
    raw = np.concatenate(parts, axis=1).astype(np.float64)
    charts, after = [], []
    for title, mean, std in (
        ("Before: SDXL's one factor 0.13025", sdxl.mean, sdxl.std),
        ("After: each channel's own mean and deviation", measured.mean, measured.std),
    ):
        z = (raw - np.array(mean)[:, None]) / np.array(std)[:, None]
        after.append({"mean": z.mean(axis=1).tolist(), "std": z.std(axis=1).tolist()})
        middles = ((_BINS[1:] + _BINS[:-1]) / 2).tolist()
        series = [
            Series(
                f"channel {number}",
                list(zip(middles, (np.histogram(row, _BINS)[0] / len(row) / 0.125).tolist(), strict=True)),
            )
            for number, row in enumerate(z)
        ]
        charts.append(line_chart(title, series, "normalised latent, in deviations", "density", ticks=range(-4, 5)))
    before = after[0]
    return Figure(
        "B",
        "Latents before and after",
        "Each channel made a standard Gaussian by its own mean and deviation, in place of one factor for all "
        "(report, appendix B).",
        "Before: means "
        + ", ".join(f"{m:+.2f}" for m in before["mean"])
        + "; deviations "
        + ", ".join(f"{s:.2f}" for s in before["std"])
        + ". After: means "
        + ", ".join(f"{m:+.2f}" for m in after[1]["mean"])
        + "; deviations "
        + ", ".join(f"{s:.2f}" for s in after[1]["std"])
        + f" ({len(rows)} pictures; statistics of all {measured.pictures}).",
        {"measured": {"mean": measured.mean, "std": measured.std}, "before": before, "after": after[1]},
        None,
        {"charts": charts},
    )
