"""Texts that could become markup, and a page as a browser's parser sees it; several test files share them."""

from xml.etree.ElementTree import Element

import html5lib

__all__ = ["HOSTILE", "HTML", "parse"]

HTML = "{http://www.w3.org/1999/xhtml}"

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "</style><img src=x onerror=alert(3)>",
    "</title><svg onload=alert(4)>",
    '" onmouseover="alert(5)',
    "' onfocus='alert(6)' autofocus='",
    "javascript:alert(7)",
    "<a href=javascript:alert(8)>x</a>",
    "<!--", "-->", "]]>", "<![CDATA[", "<?xml ?>",
    "&lt;b&gt;", "&amp;", "&#60;script&#62;",
    "{{ 7 * 7 }}", "{% raw %}", "${7*7}",
    "a\0b", "a\x1b[31mb", "\x85", "\u202egnp.exe", "\u2066x", "\ufeffx", "שלום", "x\u2028y", "lone \ud800",
    "<3", ">_<", '"quoted"', "'s", "\\", "`code`", "e\u0301", "👩‍🎨",
)  # fmt: skip
"""Tags, names and captions that could become markup, leave their place, or turn the writing round."""


def parse(page: str) -> Element:
    return html5lib.parse(page, treebuilder="etree")
