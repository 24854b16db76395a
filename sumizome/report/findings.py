"""What deserves attention in a data set, in sentences, and what to do about each.

Owns the thresholds and the words. Pure: the figures of the other modules in, findings out, the gravest first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sumizome.report.cache import Cache
from sumizome.report.left_out import Copies, Reason
from sumizome.report.pictures import CROPPED, ENLARGED, Buckets, Pictures
from sumizome.report.tagging import Tags, Tokens, Weights

__all__ = ["Finding", "find"]

_DAMAGE = frozenset(
    {"truncated", "undecodable", "bad_chunk", "broken_palette", "md5_mismatch", "decoder_died", "changed"}
)
_BY_RULE = frozenset(
    {"rating_excluded", "rating_missing", "below_min_side", "below_min_pixels", "duplicate", "near_duplicate"}
)
"""reasons that a user asked for"""
_HEAD = 0.5
"""share of showings: a tag in more of them is nearly the data set itself"""


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

    grave: bool
    what: str
    """begins with the number"""
    do: str
    section: Literal["pictures", "buckets", "tags", "weights", "captions", "duplicates", "rejects", "latents"]


def find(
    pictures: Pictures,
    buckets: Buckets,
    tags: Tags,
    weights: Weights,
    tokens: Tokens,
    rejects: list[Reason] | None,
    copies: Copies | None,
    cache: Cache | None,
) -> list[Finding]:
    """The findings, grave ones first."""
    found = [
        *_of_rejects(rejects or [], pictures),
        *_of_buckets(buckets, pictures),
        *_of_captions(pictures, tokens),
        *_of_copies(copies, pictures),
        *_of_tags(tags, weights, pictures),
        *(_of_cache(cache) if cache else ()),
    ]
    return sorted(found, key=lambda finding: not finding.grave)


def _share(count: int, of: int) -> str:
    share = count / max(1, of)
    return f"{count:,} ({'< 0.1' if 0 < share < 0.0005 else f'{100 * share:.1f}'} %)".replace(",", "\u2009")


def _of_rejects(rejects: list[Reason], pictures: Pictures) -> Iterator[Finding]:
    damaged = sum(reason.count for reason in rejects if reason.name in _DAMAGE)
    others = sum(reason.count for reason in rejects if reason.name not in _DAMAGE | _BY_RULE)
    total = pictures.count + sum(reason.count for reason in rejects)
    if damaged:
        yield Finding(
            True,
            f"{_share(damaged, total)} files are damaged and were left out",
            "Fetch them again from where they came; the table of rejects names each.",
            "rejects",
        )
    if others:
        yield Finding(
            others > 0.01 * total,
            f"{_share(others, total)} files were left out for other reasons than your rules or damage",
            "Look at the reasons: formats can be converted, names and captions mended; then ingest again.",
            "rejects",
        )


def _of_buckets(buckets: Buckets, pictures: Pictures) -> Iterator[Finding]:
    if buckets.rejected:
        yield Finding(
            True,
            f"{_share(buckets.rejected, pictures.count)} pictures are too long or too tall for every canvas, "
            "and `sumizome prepare` will reject them",
            "Crop them, or raise --max-aspect-error and --max-side.",
            "buckets",
        )
    for count, what, remedy in (
        (
            buckets.much_enlarged,
            f"are enlarged by more than {ENLARGED}×",
            "They teach blur: leave small ones out with --rules.min-side or --rules.min-pixels at ingest, or "
            "train at a smaller --area.",
        ),
        (
            buckets.much_cropped,
            f"lose more than {CROPPED:.0%} of their area",
            "Their tags may name what is no longer seen: allow longer canvases with --min-side and --max-side.",
        ),
    ):
        if count:
            grave = count > 0.05 * pictures.count
            yield Finding(grave, f"{_share(count, pictures.count)} pictures {what}", remedy, "buckets")


def _of_captions(pictures: Pictures, tokens: Tokens) -> Iterator[Finding]:
    if tokens.cut:
        about = "about " if tokens.sampled else ""
        yield Finding(
            tokens.cut > 0.01 * pictures.count,
            f"{about}{_share(tokens.cut, pictures.count)} captions are cut: they need more than "
            f"{tokens.max_chunks} chunks of 75 tokens",
            'Raise max_chunks in the training settings, or leave groups out: captions.leave_out = ["meta"].',
            "captions",
        )
    if pictures.untagged:
        yield Finding(
            pictures.untagged > 0.05 * pictures.count,
            f"{_share(pictures.untagged, pictures.count)} pictures have no tags",
            "They train the empty prompt only. Write captions beside them, or take them out of the folder.",
            "captions",
        )


def _of_copies(copies: Copies | None, pictures: Pictures) -> Iterator[Finding]:
    left = copies.left if copies else pictures.doubled
    if left:
        yield Finding(
            left > 0.02 * pictures.count,
            f"{_share(left, pictures.count)} pictures are copies of another one and are trained as often",
            "Drop them with --duplicates.exact drop (and --duplicates.near drop) at `sumizome ingest`.",
            "duplicates",
        )


def _of_tags(tags: Tags, weights: Weights, pictures: Pictures) -> Iterator[Finding]:
    tag, share = tags.most
    if share > _HEAD and weights.strength == 0 and not weights.from_table:
        yield Finding(
            False,
            f"{100 * share:.0f} % of all showings bear the tag “{tag}”",
            "Tag-based loss weighting lowers the head: tag_weights.strength = 0.5.",
            "weights",
        )
    if tags.count and tags.rare > 0.5 * tags.count:
        yield Finding(
            False,
            f"{_share(tags.rare, tags.count)} tags are shown less than {tags.min_count} times an epoch",
            "Many of such tags are misspellings: --tags.aliases at `sumizome ingest` gives each one spelling.",
            "tags",
        )
    if tags.count and len(tags.categories) == 1:
        yield Finding(
            False,
            "1 category holds all tags",
            "With --tags.categories (a CSV of tag, category), characters and artists can be protected.",
            "tags",
        )
    for line in tags.unknown_groups:
        hint = "Mend the name, or bring the category in with --tags.categories at `sumizome ingest`."
        yield Finding(True, line, hint, "tags")
    for line in weights.unused:
        yield Finding(True, line, "Mend the spelling of their tags in the table, or take the rows out.", "weights")
    bound = weights.at_least + weights.at_most
    if weights.strength > 0 and bound > 0.5 * pictures.count:
        yield Finding(
            False,
            f"{_share(bound, pictures.count)} pictures lie at a bound of the loss weight",
            "Lower tag_weights.strength, or widen min_weight and max_weight.",
            "weights",
        )


def _of_cache(cache: Cache) -> Iterator[Finding]:
    if not cache.of_this_manifest:
        yield Finding(
            True,
            "0 of the latents are known to be of this manifest: they were prepared from another",
            "Run `sumizome prepare` with this manifest into another folder.",
            "latents",
        )
    if cache.other_vae:
        yield Finding(
            True,
            "0 of the latents fit the model: another VAE made them",
            "Run `sumizome prepare` with this model into another folder.",
            "latents",
        )
    if cache.damages or cache.missing:
        yield Finding(
            True,
            f"{cache.missing:,} pictures are not prepared yet or lie in damaged units".replace(",", "\u2009"),
            f"Go on with `{cache.plan.command}`.",
            "latents",
        )
    if cache.stray_bytes > 0.01 * max(1, cache.bytes):
        yield Finding(
            False,
            f"{cache.stray_bytes / 1e6:.3g} MB in the latent folder belong to no unit",
            "They are what a stopped run left, or foreign files; `sumizome prepare` clears its own when it goes on.",
            "latents",
        )
    off = [row for row in cache.channels if abs(row.trained_mean) > 0.5 or not 0.5 < row.trained_std < 2]
    if off:
        yield Finding(
            False,
            f"{len(off)} of {len(cache.channels)} latent channels are far from mean 0 and deviation 1 in training",
            "Consider latent statistics of this set (report, appendix B).",
            "latents",
        )
