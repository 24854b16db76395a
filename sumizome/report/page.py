"""The frame of a self-contained page: one file, no script, nothing fetched, data shown as text whatever it holds.

Owns the template environment, the content policy and how text that cannot be seen is shown; what a page says is its
template's. Invariant: every value reaches the page through autoescaping and `visible`, so no element, attribute or
direction of writing arises from data. Drawings are `charts.Chart`s, drawn by templates/frame.html.j2.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sumizome import __version__
from sumizome.errors import ConfigError
from sumizome.files import write_atomically

__all__ = ["check_page_path", "image_uri", "render_page", "size_in_words", "visible", "write_page"]

_TEMPLATES = Path(__file__).parent / "templates"
_GENERATOR = '<meta name="generator" content="sumizome'

# Control characters, surrogates, byte order marks, line separators, and all that change the direction of writing.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb]")


def visible(text: str) -> str:
    """The text with what cannot be seen made visible: ␀ for NUL, ⟨U+202E⟩ for a mark of direction."""

    def show(match: re.Match[str]) -> str:
        code = ord(match.group())
        if code < 0x20 or code == 0x7F:
            return "␡" if code == 0x7F else chr(0x2400 + code)
        return f"⟨U+{code:04X}⟩"

    return _UNSEEN.sub(show, text)


def image_uri(webp: bytes) -> Markup:
    """A WebP picture as a data: address; base64 has no sign that HTML knows."""
    return Markup("data:image/webp;base64,") + base64.b64encode(webp).decode("ascii")


def render_page(template: str, facts: Mapping[str, Any]) -> str:
    """The page of a template that extends `frame.html.j2`, with `facts` as its names."""
    css = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    frame = {"css": Markup(css), "policy": policy, "version": __version__}
    return _environment().get_template(template).render({**facts, **frame})


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
        # Called with every value before it is escaped; what is Markup already was made here, not by data.
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"count": _count, "percent": _percent, "px": _px, "size": size_in_words}
    return environment


def _count(number: float | int) -> str:
    """12 345 as people read it; thin spaces, which no country takes for a decimal sign."""
    return f"{number:,.0f}".replace(",", "\u2009")


def _percent(share: float | int) -> str:
    """0.0312 → "3.1 %"; small shares keep a digit that is not zero."""
    if share != 0 and abs(share) < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f}\u2009%"


def _px(size: tuple[int, int]) -> str:
    """(height, width) as "height × width"."""
    height, width = size
    return f"{height}\u2009×\u2009{width}"


def size_in_words(count: float | int) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}\u2009{unit}"
    return f"{count:.0f} bytes"


def check_page_path(path: Path) -> None:
    """Raises: ConfigError if a page cannot be written at `path` without harm to something else."""
    if path.suffix != ".html" or path.is_dir():
        raise ConfigError(f"--out: expected the path of a .html file to write, found {path}.")
    if path.exists() and _GENERATOR.encode() not in path.read_bytes()[:4096]:
        raise ConfigError(f"--out: {path} is there already and is no page of sumizome; give another name.")


def write_page(path: Path, page: str) -> None:
    """Raises: DataError if the disk refuses."""
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
