"""Pictures on a page: a few files decoded in processes that a picture may kill, small, as data.

Owns which files may be opened for it. Invariant: this process decodes nothing, and a path from a table that anybody may
have edited opens no file outside the folders of the manifest.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from sumizome.data.images import Colour
from sumizome.data.listing import printable
from sumizome.data.tar_reader import TarDamage, read_members
from sumizome.data.tasks import ImageTask
from sumizome.data.verification import Facts, Look, inspect_all
from sumizome.report.page import image_uri

__all__ = ["Member", "Picture", "Place", "find_members", "look_at"]

_SIDE = 200
"""px of a thumbnail's longer side: 100 on the page, sharp on fine screens"""

Place = tuple[str, str]
"""(folder, posix path below it; of a tar's member `a.tar/member`)"""

Member = tuple[str, int, int]
"""(tar below its folder, "" = the folder is the tar; first byte, bytes), as a manifest has it"""


@dataclass(frozen=True)
class Picture:
    """A file on the page."""

    path: str
    uri: Markup | None
    """a WebP; None where the file does not decode or is not there"""
    size: tuple[int, int] | None
    """(height, width) px of the original"""


def look_at(
    places: Iterable[Place],
    folders: Iterable[Path],
    background: Colour,
    workers: int,
    members: Mapping[Place, Member] | None = None,
) -> dict[Place, Picture]:
    """The pictures at some places; those that cannot be shown are without a thumbnail.

    `members` are the places that lie in a tar.
    """
    lie = members or {}
    wanted = list(dict.fromkeys(places))
    roots = {str(folder): folder.resolve() for folder in folders}
    tasks = [
        ImageTask(0, str(roots[folder]), path, 1, None, None, None, *lie.get((folder, path), (None, None, -1)))
        for folder, path in wanted
        if _may_open((folder, lie[folder, path][0] if (folder, path) in lie else path), roots)
    ]
    pictures = {place: Picture(place[1], None, None) for place in wanted}
    of_root = {str(root): folder for folder, root in roots.items()}
    for task, outcome in inspect_all(tasks, Look(background, False, _SIDE), workers):
        if isinstance(outcome, Facts):
            size = (outcome.height, outcome.width)
            pictures[of_root[task.root], task.path] = Picture(task.path, image_uri(outcome.thumbnail), size)
    return pictures


def find_members(places: Iterable[Place], folders: Iterable[Path]) -> dict[Place, Member]:
    """Where those of the places lie that are called as members of a tar: `a.tar/member`, or below a source that is one.

    No table says where a reject lies, so the few tars are listed; a damaged one tells what stands before the damage.
    """
    roots = {str(folder): folder.resolve() for folder in folders}
    wanted: dict[tuple[str, str], dict[str, Place]] = {}
    for folder, path in dict.fromkeys(places):
        if folder in roots and roots[folder].is_file():
            wanted.setdefault((folder, ""), {})[path] = folder, path
        elif ".tar/" in path.lower():
            end = path.lower().index(".tar/") + 4
            wanted.setdefault((folder, path[:end]), {})[path[end + 1 :]] = folder, path
    found: dict[Place, Member] = {}
    for (folder, tar), names in wanted.items():
        if _may_open((folder, tar), roots):
            with contextlib.suppress(TarDamage, OSError):
                for member in read_members(roots[folder] / tar):
                    if member.kind == "file" and (place := names.pop(printable(member.name), None)) is not None:
                        found[place] = tar, member.offset, member.size
    return found


def _may_open(place: Place, roots: dict[str, Path]) -> bool:
    """A regular file that lies below its folder, links followed."""
    folder, path = place
    try:
        target = (roots[folder] / path).resolve()
        return target.is_relative_to(roots[folder]) and target.is_file()
    except (KeyError, OSError, ValueError, RuntimeError):
        return False
