"""What `sumizome inspect` prints for people: sections, tables, colours. Nothing is found out here."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sumizome.components import Component
from sumizome.evidence import Evidence
from sumizome.files import readable_size
from sumizome.inspection import Findings
from sumizome.programs import Verdict

if TYPE_CHECKING:  # it imports numpy, which a header does not need
    from sumizome.models.weight_scan import WeightScan

__all__ = ["print_findings"]


def print_findings(console: Console, findings: Findings, scan: "WeightScan | None") -> None:
    """Prints all that was found, and what reading the weights showed if they were read."""

    def section(title: str, *body: Any) -> None:
        console.print()
        console.print(Text(title, style="bold"))
        for part in body:
            console.print(Padding(part, (0, 0, 0, 2), expand=False))

    console.print(Text(str(findings.path), style="bold"))
    facts = (findings.kind, readable_size(findings.bytes), _numbers(findings.parameters), _mix(findings))
    console.print(Text(" · ".join(facts)))
    if findings.evidence:
        unsaid = [Text(line, style="yellow") for line in _unsaid(findings)]
        verdict = Text(_verdict(findings), style="bold cyan")
        section("Prediction", verdict, _evidence_table(findings.evidence), *unsaid)
    if findings.components:
        section("Components", _component_table(findings.components))
    section("Problems", *_damage(findings, scan))
    if findings.metadata:
        section("Metadata", _metadata_table(findings.metadata))
    if findings.programs:
        section("What each program makes of it", _program_table(findings.programs))
        if any("mend" in verdict.action for verdict in findings.programs):
            mend = f"mend: sumizome mend {findings.path} --out NAME.safetensors, or --out FOLDER"
            console.print(Padding(Text(mend, "dim"), (0, 0, 0, 2), expand=False))
        if "small size" in findings.kind:
            only = "Most programs open SDXL at its full size alone: read these rows as those of a full-size model."
            console.print(Padding(Text(only, "dim"), (0, 0, 0, 2), expand=False))


def _verdict(findings: Findings) -> str:
    if findings.prediction_type == "EDM":
        return "EDM, which SDXL is not"
    schedule = (
        "zero terminal SNR: sampling starts at pure noise"
        if findings.zero_terminal_snr
        else "SDXL's own schedule, which ends at sigma 14.6"
    )
    return f"{findings.prediction_type} · {schedule}"


def _unsaid(findings: Findings) -> list[str]:
    """What no place says and every program assumes, which is how a v model without its marks comes to draw mush."""
    if findings.layout == "folder":
        return []
    if all(row.prediction_type is None or row.source.startswith("nothing") for row in findings.evidence):
        return [
            "Nothing says so, it is only assumed. Does it draw noise or mush? Then it predicts v: mend --prediction v"
        ]
    if findings.prediction_type == "v_prediction" and all(row.zero_terminal_snr is None for row in findings.evidence):
        return [
            "Nothing says whether it was trained to pure noise. If it was (most v models): mend --zero-terminal-snr"
        ]
    return []


def _grid(*columns: dict[str, Any]) -> Table:
    grid = Table(box=None, show_header=any("header" in column for column in columns), padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(**{"overflow": "fold", "header_style": "dim"} | column)
    return grid


_MARKS = {"decides": "→", "agrees": "✓", "contradicts": "✗", "silent": " "}
_STYLES = {"decides": "bold", "agrees": "", "contradicts": "red", "silent": "dim"}


def _evidence_table(evidence: tuple[Evidence, ...]) -> Table:
    """In the order of belief, from the most to the least."""
    table = _grid({"width": 1}, {}, {}, {})
    for row in evidence:
        cells = (_MARKS[row.verdict], row.source, row.found, "" if row.verdict == "silent" else row.verdict)
        table.add_row(*(Text(cell, style=_STYLES[row.verdict]) for cell in cells))
    return table


def _component_table(components: tuple[Component, ...]) -> Table:
    right = {"justify": "right"}
    table = _grid(
        {"header": "network"},
        *({"header": heading} | right for heading in ("tensors", "parameters", "size")),
        {"header": "dtype"},
        {"header": "names and shapes"},
    )
    for part in components:
        faults = [
            f"{len(names)} {word}"
            for word, names in (("missing", part.missing), ("foreign", part.foreign), ("misshapen", part.misshapen))
            if names
        ]
        state = Text(", ".join(faults), "red") if faults else Text("complete", "green")
        counts = (f"{part.tensors:,}", f"{part.parameters:,}", readable_size(part.bytes))
        table.add_row(part.name, *counts, ", ".join(map(_dtype, part.dtypes)), state)
    return table


def _damage(findings: Findings, scan: "WeightScan | None") -> list[Any]:
    lines = [Text(f"✗ {problem}", "red") for problem in findings.problems]
    if not findings.problems:
        checked = "every name and shape is SDXL's" if findings.components else "the header is sound"
        lines.append(Text(f"none found: {checked}", "green"))
    if scan is None:
        return [*lines, Text("weights not read: --weights looks for NaN, infinity and overflow in float16", "dim")]
    return lines + [Text(*line) for line in _weight_lines(findings, scan)]


def _weight_lines(findings: Findings, scan: "WeightScan") -> list[tuple[str, str]]:
    lines = []
    for name, count in list(scan.not_finite.items())[:3]:
        lines.append((f"✗ {name} holds {count:,} numbers that are NaN or infinite", "red"))
    if len(scan.not_finite) > 3:
        lines.append((f"✗ and {len(scan.not_finite) - 3:,} more tensors: the model answers with NaN", "red"))
    for name, largest in list(scan.too_large.items())[:3]:
        lines.append((f"✗ {name} reaches {largest:.3g}: float16 cannot hold it, use bf16 or fp32", "red"))
    for name in scan.all_zero[:3]:
        lines.append((f"! {name} is all zeros", "yellow"))
    if not scan.not_finite and not scan.too_large:
        lines.append((f"{readable_size(scan.bytes_read)} of weights read: all finite, and float16 holds them", "green"))
    stated = findings.metadata.get("modelspec.hash_sha256", "").removeprefix("0x").lower()
    actual = scan.data_sha256.get(findings.path.name)
    if stated and stated == actual:
        lines.append(("the data is what the metadata's hash_sha256 says", "green"))
    elif stated:
        lines.append(("! the metadata's hash_sha256 is not this data's: the weights were changed since", "yellow"))
    return lines


_FIRST = ("title", "architecture", "author", "description", "license", "date", "resolution", "prediction_type")
_MOST_METADATA = 12


def _metadata_table(metadata: dict[str, str]) -> Table:
    """The keys that people look for first; the rest counted."""
    wanted = [f"modelspec.{key}" for key in _FIRST] + ["prediction_type", "software"]
    keys = [key for key in wanted if key in metadata]
    keys += [key for key in metadata if key not in keys]
    width = max(len(_plain(key)) for key in keys[:_MOST_METADATA])
    table = _grid({"no_wrap": True, "min_width": min(width, 40)}, {"no_wrap": True, "overflow": "ellipsis"})
    for key in keys[:_MOST_METADATA]:
        table.add_row(Text(_plain(key), "dim"), Text(_plain(metadata[key])))
    if len(keys) > _MOST_METADATA:
        table.add_row(Text(f"and {len(keys) - _MOST_METADATA} more (--json shows all)", "dim"), "")
    return table


def _plain(text: str) -> str:
    """One short line without control characters, which could drive the terminal."""
    line = "".join(character if character.isprintable() else " " for character in text[:200])
    return f"{line}…" if len(text) > 200 else line


_SEEN = {"v_prediction": "v", "epsilon": "epsilon", "sample": "sample", "EDM": "EDM", None: "—"}


def _program_table(programs: tuple[Verdict, ...]) -> Table:
    table = _grid(
        {"width": 1, "header": ""},
        {"header": "program", "no_wrap": True},
        {"header": "takes it for"},
        {"header": "ends at"},
        {"header": "what you do"},
    )
    for verdict in programs:
        ends = {None: "—", True: "pure noise", False: "sigma 14.6"}[verdict.zero_terminal_snr]
        style = "" if verdict.right else "red" if verdict.prediction_type else "dim"
        mark = Text("✓" if verdict.right else "✗", "green" if verdict.right else style)
        cells = (verdict.program, _SEEN[verdict.prediction_type], ends)
        table.add_row(mark, *(Text(cell, style) for cell in cells), Text(verdict.action))
    return table


_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64", "F8_E4M3": "fp8 e4m3", "F8_E5M2": "fp8 e5m2"}


def _dtype(name: str) -> str:
    return _DTYPES.get(name, name)


def _mix(findings: Findings) -> str:
    return " + ".join(map(_dtype, findings.dtypes)) or "no weights"


def _numbers(count: int) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit} parameters"
    return f"{count:,} parameters"
