"""Say what a model file is, what is wrong with it, and what each program will make of it.

    sumizome inspect model.safetensors
    sumizome inspect model.safetensors --weights
    sumizome inspect diffusers-folder --json

Reads the header alone, so that a file of 7 GB is answered at once. With --weights every number is read too: NaN,
infinity, and what float16 cannot hold. `sumizome mend` writes a corrected copy.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from sumizome.inspection import Findings
    from sumizome.models.weight_scan import WeightScan

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome inspect` takes."""

    model: Annotated[Path, tyro.conf.Positional]
    """A safetensors file, or a diffusers folder."""
    weights: bool = False
    """Read every weight: NaN, infinity, overflow in float16, and the hash that the metadata states."""
    json: bool = False
    """Print everything as one JSON object, every name and all metadata in full."""


def run(command: Command) -> None:
    """Prints the findings.

    Raises:
        ModelError: a file that cannot be read as safetensors, or a folder that holds no SDXL.
    """
    from sumizome.inspection import inspect_model

    findings = inspect_model(command.model)
    scan = None
    if command.weights:
        from sumizome.models.weight_scan import scan_weights

        scan = scan_weights(findings.headers)
    if command.json:
        print(json.dumps(_as_json(findings, scan), indent=2))
        return
    from rich.console import Console

    from sumizome.cli.inspect_tables import print_findings

    console = Console(highlight=False)
    print_findings(console if console.is_terminal else Console(highlight=False, width=100), findings, scan)


def _as_json(findings: "Findings", scan: "WeightScan | None") -> dict[str, Any]:
    found = {key: value for key, value in asdict(findings).items() if key != "headers"}
    found |= {"path": str(findings.path), "sidecar": str(findings.sidecar) if findings.sidecar else None}
    return found | {"weights": asdict(scan) if scan else None}
