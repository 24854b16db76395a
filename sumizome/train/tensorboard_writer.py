"""A run's numbers and pictures as events for TensorBoard.

Written here and now: TensorBoard's own writer leaves it to a thread, which on a full disk prints its traceback, tells
of the loss with a later record, and is then of no more use. The invariant: the file holds whole events.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sumizome.files import AppendedFile

__all__ = ["TensorBoardWriter"]


class TensorBoardWriter:
    """Writes one file of events, from its first record on; `close` it."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """`first_step`: where the run goes on; TensorBoard forgets what other files have from there on."""
        # TensorBoard reads files in the order of their names.
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._first_step = first_step
        self._file: AppendedFile | None = None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the values of a step. Raises: OSError, with none of them recorded."""
        # A heavy import: the first step does not wait for it, and a run without TensorBoard does not pay for it.
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._append(step, summary=Summary(value=values))

    def write_image(self, step: int, name: str, image: Any) -> None:
        """Records a picture [H, W, 3] uint8. Raises: OSError."""
        from torch.utils.tensorboard.summary import image as summary_of

        self._append(step, summary=summary_of(name, image, dataformats="HWC"))

    def close(self) -> None:
        """Closes the file. Raises: OSError."""
        if self._file is not None:
            self._file.close()

    def _append(self, step: int, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = AppendedFile(self._path)
            first = {"step": self._first_step}
            start = {"session_log": SessionLog(status=SessionLog.START), **first}
            file.write(_record(file_version="brain.Event:2", **first) + _record(**start))
            self._file = file
        self._file.write(_record(step=step, **event))


def _record(**event: Any) -> bytes:
    """An event as it stands in a file, framed by its length and checksums."""
    from io import BytesIO

    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    framed = BytesIO()
    RecordWriter(framed).write(Event(wall_time=time.time(), **event).SerializeToString())
    return framed.getvalue()
