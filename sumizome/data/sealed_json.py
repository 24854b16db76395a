"""Files of a latent folder: written whole or not at all; JSON that carries its own SHA-256, so that damage is seen."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sumizome.errors import ShardError
from sumizome.files import write_atomically

__all__ = ["digest_of", "read_sealed_json", "write_file", "write_sealed_json"]


def write_file(path: Path, content: bytes) -> dict[str, Any]:
    """Every file of a latent folder comes through here. Returns what its record says of it."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON that carries its own SHA-256, so that a flipped bit in it is seen."""
    text = json.dumps({**content, "digest": digest_of(content)}, indent=1, ensure_ascii=False) + "\n"
    write_file(path, text.encode())


def read_sealed_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ShardError(f"{path} cannot be read ({error}); {remedy}") from error
    if digest != digest_of(content):
        raise ShardError(f"{path} is damaged: it does not match the digest that it carries; {remedy}")
    return dict(content)


def digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
