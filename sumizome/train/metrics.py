"""What a run tells: one JSON object a line in `metrics.jsonl`, the same numbers in TensorBoard.

After a resume the file holds each step once: lines beyond the checkpoint are cut before new ones are written.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Metrics", "read_metrics"]


class Metrics:
    """Writes a run's numbers; `close` it, or use it as a context."""

    def __init__(self, run_dir: Path, steps_done: int, tensorboard: bool) -> None:
        path = run_dir / "metrics.jsonl"
        _cut(path, steps_done)
        self._file = path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            # A heavy import, and only here: a run without TensorBoard does not pay for it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=steps_done + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of a step. A nested mapping becomes one scalar a key in TensorBoard."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in _scalars(values):
                self._writer.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: Any) -> None:
        """Records a picture [H, W, 3] uint8 in TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _cut(path: Path, steps_done: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= steps_done]
    if path.exists():
        unfinished = path.with_suffix(".jsonl.unfinished")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        unfinished.replace(path)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)
