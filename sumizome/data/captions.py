"""Captions: the tags of an image as the text that one showing of it trains on.

Owns order, kept tags, shuffle, and dropout of tags, groups and captions. Invariant: a caption is a function of (tags,
config, seed, epoch, sample id, repeat), so no state is kept and any step can be rebuilt. Each showing draws the same
numbers in the same order whatever the config says: raising a dropout drops more of the same caption and reorders
nothing.
"""

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sumizome.data.listing import printable
from sumizome.data.tags import GENERAL
from sumizome.errors import ConfigError
from sumizome.seeds import derive_seed

__all__ = ["CaptionConfig", "build_caption", "plain_caption", "unknown_groups"]

PEOPLE = "people"
"""the group of tags that count who is in the picture, told by their spelling, not by a category list"""

_PEOPLE = re.compile(r"(\d+\+?|multiple )(girl|boy|other)s?|no humans")


@dataclass(frozen=True)
class CaptionConfig:
    """From tags to caption, a new one at each showing."""

    shuffle: bool = True
    """draw a new order of the tags at each showing, so that no tag comes to mean its place; `order` still holds"""
    keep_tokens: int = 0
    """leading tags that are never moved or dropped, in images whose caption file has no `|||` marker"""
    tag_dropout: float = 0.0
    """probability that a tag is left out, each on its own; kept tags stay"""
    caption_dropout: float = 0.1
    """probability of an empty caption; 0.1, as SDXL was trained: guidance needs a model that knows the empty prompt"""
    order: tuple[str, ...] = (PEOPLE, "character", "copyright")
    """groups of tags that come first, in this sequence: `people` (1girl, 2boys, no humans) and tag categories.
    The default is the order in which people write prompts. Shuffling stays within a group"""
    protect: tuple[str, ...] = ()
    """groups that `tag_dropout` spares, such as character and artist.
    A name that is dropped from its own pictures is learned as something that needs no saying"""
    leave_out: tuple[str, ...] = ()
    """groups whose tags are in no caption, such as meta; they still count in tag weights"""
    group_dropout: tuple[str, ...] = ()
    """`group=probability` that all tags of a group are left out together, such as "artist=0.2".
    So a picture is also learned without its artist's name"""
    separator: str = ", "
    """between tags; contains a comma, because long captions are cut into chunks at commas"""

    def __post_init__(self) -> None:
        for name in ("tag_dropout", "caption_dropout"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"{name}: expected a probability between 0 and 1, found {value}.")
        if self.keep_tokens < 0:
            raise ConfigError(f"keep_tokens: expected 0 or more, found {self.keep_tokens}.")
        self.group_probabilities()

    def group_probabilities(self) -> dict[str, float]:
        """`group_dropout`, read."""
        found = {}
        for text in self.group_dropout:
            group, _, number = text.partition("=")
            try:
                probability = float(number)
            except ValueError:
                probability = -1.0
            if not 0 <= probability <= 1 or not group or group in found:
                raise ConfigError(f'group_dropout: expected group=probability such as "artist=0.2", found {text!r}.')
            found[group] = probability
        return found


def build_caption(
    tags: Sequence[str],
    kept_tags: int,
    config: CaptionConfig,
    *,
    seed: int,
    epoch: int,
    sample_id: str,
    repeat: int,
    categories: Mapping[str, str] | None = None,
) -> str:
    """The caption of one showing of one image.

    `tags` and `kept_tags` as in the manifest; `categories` maps tags to the names that `config.order` uses.
    """
    # Only Random.random(): its sequence for a seed is promised by Python, that of shuffle() is not.
    draw = random.Random(derive_seed(seed, "caption", epoch, sample_id, repeat)).random
    if draw() < config.caption_dropout:
        return ""
    kept, movable = _split_kept(tags, kept_tags, config)
    drawn = [(draw(), draw(), tag) for tag in movable]
    # Groups draw from sources of their own, so that naming one changes nothing else of the caption.
    gone = {
        group
        for group, probability in config.group_probabilities().items()
        if random.Random(derive_seed(seed, "caption group", group, epoch, sample_id, repeat)).random() < probability
    }
    gone.update(config.leave_out)
    left = [
        (place, tag)
        for place, drop, tag in drawn
        if (drop >= config.tag_dropout or _is_of(tag, config.protect, categories))
        and not (gone and _is_of(tag, gone, categories))
    ]
    if config.shuffle:
        left.sort()
    return config.separator.join([*kept, *_ordered([tag for _, tag in left], config.order, categories)])


def plain_caption(
    tags: Sequence[str], kept_tags: int, config: CaptionConfig, *, categories: Mapping[str, str] | None = None
) -> str:
    """The caption without chance, for validation and previews: in `config.order`, else as in the file, every tag that
    is not of a group to leave out."""
    kept, movable = _split_kept(tags, kept_tags, config)
    movable = [tag for tag in movable if not _is_of(tag, config.leave_out, categories)]
    return config.separator.join([*kept, *_ordered(movable, config.order, categories)])


def unknown_groups(config: CaptionConfig, categories: Collection[str]) -> list[str]:
    """A line for each group that the config names though no tag of a data set is in it: it has no effect.

    `categories`: those of the data set. The groups of the default order may be missing: it is for any data set.
    """
    known = {PEOPLE, GENERAL, *categories}
    named = {
        "order": [group for group in config.order if group not in CaptionConfig.order],
        "protect": config.protect,
        "leave_out": config.leave_out,
        "group_dropout": config.group_probabilities(),
    }
    return [
        f"captions.{option} names '{printable(group)}', which has no effect: no tag here is of that category "
        f"(there are {', '.join(printable(name) for name in sorted(known))})"
        for option, groups in named.items()
        for group in dict.fromkeys(groups)
        if group not in known
    ]


def _split_kept(tags: Sequence[str], kept_tags: int, config: CaptionConfig) -> tuple[Sequence[str], Sequence[str]]:
    kept = kept_tags or config.keep_tokens
    return tags[:kept], tags[kept:]


def _is_of(tag: str, groups: Collection[str], categories: Mapping[str, str] | None) -> bool:
    """Whether the tag's category is among the groups; one that counts people is of that group, too."""
    if not groups:
        return False
    return (categories or {}).get(tag, GENERAL) in groups or (PEOPLE in groups and _counts_people(tag))


@lru_cache(maxsize=1 << 14)
def _counts_people(tag: str) -> bool:
    return bool(_PEOPLE.fullmatch(tag))


def _ordered(tags: Sequence[str], order: tuple[str, ...], categories: Mapping[str, str] | None) -> list[str]:
    """The tags by group, in the given sequence within a group (sorting is stable)."""
    rank = {group: i for i, group in enumerate(order)}

    def group_rank(tag: str) -> int:
        if PEOPLE in rank and _counts_people(tag):
            return rank[PEOPLE]
        return rank.get((categories or {}).get(tag, GENERAL), len(rank))

    return sorted(tags, key=group_rank)
