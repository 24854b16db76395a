"""Processes that stand for ranks, without torchrun: the environment that it sets, on the loopback interface."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Job", "start_ranks"]


class Job:
    """Running ranks; `wait` for them, or send one a signal."""

    def __init__(self, ranks: list[subprocess.Popen[str]], logs: list[Path]) -> None:
        self.ranks, self._logs = ranks, logs

    def wait(self, timeout: float) -> list[int]:
        """The exit status of each; whatever still runs after `timeout` seconds is killed and is an error."""
        try:
            return [rank.wait(timeout) for rank in self.ranks]
        finally:
            self.kill()

    def kill(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()

    def said(self, rank: int) -> str:
        """What a rank has written so far, both streams."""
        return self._logs[rank].read_text(errors="replace")


def start_ranks(world: int, command: Sequence[str], logs: Path, **environment: str) -> Job:
    """Starts `python *command` once a rank; its output goes to files below `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks, paths = [], []
    for rank in range(world):
        paths.append(logs / f"rank-{rank}.log")
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(sys.path)}
        with paths[-1].open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env={**os.environ, **quiet, **(own if world > 1 else {}), **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return Job(ranks, paths)
