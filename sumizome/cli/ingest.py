"""Read folders of pictures and captions, or of pictures and a dump of records, into a manifest.

Takes PNG, JPEG and WebP with captions in same-named .txt or .caption files or a metadata.jsonl; with --kind, the
records of a booru dump, gallery-dl or kohya, a Hugging Face imagefolder, webdataset tars. Decodes every picture once,
and says which ones it left out and why; stopped and started again, it goes on where it was. Never writes to the
folders. Several sources with settings of their own stand in a file: --sources.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from sumizome.data.source_config import DuplicateConfig, PictureRules, SourceKind, TagLists

if TYPE_CHECKING:
    from rich.console import Console

    from sumizome.data.ingest import IngestResult
    from sumizome.data.source_config import SourceConfig

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """Read folders of pictures, with captions or records, into a manifest."""

    folders: Positional[tuple[Path, ...]]
    """folders of pictures, or of tars, or tars, read by the options below; folders inside them named like 10_name show
    their pictures 10 times an epoch"""
    manifest: Path
    """the .parquet file to write, outside the folders; what was left out is listed beside it in .rejects.csv, what is
    there more than once in .duplicates.csv"""
    background: str = "white"
    """colour behind transparent pictures: a name or #rrggbb; white, as most drawings are meant to be seen"""
    workers: int | None = None
    """processes that decode, by default one a core; 0 = decode in the main process, to look for a fault"""
    sources: Path | None = None
    """a TOML file of [[source]] tables: folder, kind, records, repeats, rules, columns; they come after the folders"""
    kind: SourceKind = "folder"
    """what stands beside the pictures. folder: captions. booru: a dump, --records, of pictures named by id or md5.
    gallery-dl: name.ext.json beside each. kohya: its metadata JSON, --records. imagefolder: metadata.jsonl, .csv or
    .parquet in the folders. webdataset: tars of pictures with .txt, .caption, .tags or .json, or with --records"""
    records: Path | None = None
    """the dump, .jsonl, .parquet or .csv; for kohya its JSON"""
    damaged_tars: Literal["stop", "reject"] = "stop"
    """a tar that is truncated or damaged: stop, naming it, or leave out all of its pictures and go on"""
    decode_again: bool = False
    """decode every picture, also those whose files are as they were at the last run"""
    rules: PictureRules = field(default_factory=PictureRules)
    tags: TagLists = field(default_factory=TagLists)
    duplicates: DuplicateConfig = field(default_factory=DuplicateConfig)


def run(command: Command) -> None:
    """Writes the manifest and prints what is in it and what is not."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sumizome.data.images import parse_colour
    from sumizome.data.ingest import ingest_to
    from sumizome.data.ingest_tables import copies_path

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("listing", total=None)

        def told(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total or None, description="decoding" if total else "listing")

        result = ingest_to(
            command.manifest,
            _sources(command),
            tag_lists=command.tags,
            duplicates=command.duplicates,
            background=parse_colour(command.background),
            workers=command.workers,
            progress=told,
            decode_again=command.decode_again,
        )
    _print_summary(console, result)
    _print_rejects(console, result, command.manifest)
    if result.copies:
        console.print(f"duplicates: {copies_path(command.manifest)}", markup=False, highlight=False, soft_wrap=True)
    _print_mismatches(console, result, command.manifest)
    console.print(f"wrote {command.manifest}", markup=False, highlight=False, soft_wrap=True)


def _sources(command: Command) -> "list[SourceConfig]":
    from sumizome.data.source_config import SourceConfig
    from sumizome.data.source_file import load_sources
    from sumizome.errors import ConfigError

    if command.records is not None and len(command.folders) != 1:
        raise ConfigError(
            f"--records belongs to one folder, found {len(command.folders)}: name several in a file and give --sources."
        )
    if not command.folders and (command.kind, command.rules) != ("folder", PictureRules()):
        raise ConfigError(
            "--kind and --rules belong to folders on the command line, found none: set them in --sources."
        )
    here = [
        SourceConfig(each, command.kind, command.records, damaged_tars=command.damaged_tars, rules=command.rules)
        for each in command.folders
    ]
    return here + (load_sources(command.sources) if command.sources else [])


def _print_summary(console: "Console", result: "IngestResult") -> None:
    from rich.table import Table

    from sumizome.data.listing import printable
    from sumizome.data.tags import tag_counts

    rows = result.manifest.table
    counts = tag_counts(rows)
    facts = {
        "pictures": len(rows),
        "shown in an epoch": sum(rows["repeats"].to_pylist()),
        "different tags": len(counts),
        "without a caption": result.captions_missing,
        "with an empty caption": result.captions_empty,
        "with two captions": result.captions_doubled,
        "byte-identical to another": result.duplicates,
        "nearly identical to another": sum(copy.kind == "near" and not copy.dropped for copy in result.copies),
        "colour profile not usable": result.profiles_ignored,
        "other files passed over": result.files_ignored,
        "records without a picture": result.records_unused,
        "other than their record says": len(result.mismatches),
        "known from an earlier run": result.found_earlier,
        "rejected": len(result.rejects),
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    always = ("pictures", "different tags", "without a caption", "rejected")
    for name, number in facts.items():
        if number or name in always:
            table.add_row(name, f"{number:,}")
    console.print(table)
    common = ", ".join(f"{printable(row['tag'])} {row['count']}" for row in counts.slice(0, 12).to_pylist())
    console.print(f"most frequent: {common}", markup=False, highlight=False)
    for folder, repeats in result.repeats.items():
        console.print(f"repeats {repeats}: {folder}", markup=False, highlight=False, soft_wrap=True)


def _print_mismatches(console: "Console", result: "IngestResult", manifest: Path) -> None:
    from sumizome.data.ingest_tables import mismatches_path

    if not result.mismatches:
        return
    first = result.mismatches[0]
    console.print(
        f"first that is not as its record says: {first.path} (record {first.told}, file {first.found}); "
        f"all of them: {mismatches_path(manifest)}; leave them out with --rules.mismatch reject",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _print_rejects(console: "Console", result: "IngestResult", manifest: Path) -> None:
    from collections import defaultdict

    from rich.markup import escape
    from rich.table import Table

    from sumizome.data.ingest_tables import rejects_path

    if not result.rejects:
        return
    by_reason = defaultdict(list)
    for reject in result.rejects:
        by_reason[reject.reason].append(reject)
    table = Table("rejected", "", "first of them", "what is wrong", box=None, padding=(0, 2, 0, 0))
    for reason, rejects in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        paths = "\n".join(escape(reject.path) for reject in rejects[:3])
        table.add_row(reason, str(len(rejects)), paths, escape(rejects[0].sentence))
    console.print(table)
    console.print(f"all of them: {rejects_path(manifest)}", markup=False, highlight=False, soft_wrap=True)
