"""A preparation on a Ray cluster: one core task a unit, on whichever machine has room for it.

Owns the connection and the tasks; needs `sumizome[ray]`, on every machine the same version. The pictures and the folder
of the latents must lie under the same paths everywhere; the VAE travels. Ray's ports run what they are sent: a cluster
belongs on a private network. The invariant: as in `executors`; Ray repeats a task whose worker died.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sumizome.device import choose_device
from sumizome.errors import ConfigError, SumizomeError
from sumizome.prepare_work import Event, Work, work_through

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["RayExecutor"]

_POLL_SECONDS = 0.5
_RETRIES = 3
_loaded: dict[str, Any] = {}
"""In a worker: what the last preparation sent, with its VAE on the device."""


@dataclass(frozen=True)
class RayExecutor:
    """The cluster at an address ("auto": the one of this machine); without one, a cluster of this process alone."""

    address: str | None = None
    device: str = "auto"
    num_cpus: int | None = None
    """Of the cluster of this process alone; None = the cores there are."""

    def make(self, work: Work, vae: "AutoencoderKL", units: Sequence[int]) -> Iterator[Event]:
        """See `executors.Executor`."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise ConfigError("executor 'ray' needs Ray; install it with `pip install 'sumizome[ray]'`") from error
        own = not ray.is_initialized()
        if own:
            self._connect(ray)
        try:
            yield from self._run(ray, work, vae, units)
        finally:
            if own:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        self._check_address()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address is not None:
                ray.init(address=self.address, **quiet)
            else:  # its own ports, on loopback
                ray.init(num_cpus=self.num_cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        except Exception as error:  # Ray tells a start that failed by a bare Exception
            ray.shutdown()
            place = f"no Ray cluster at {self.address}" if self.address is not None else "Ray did not start here"
            raise ConfigError(f"{place}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error

    def _check_address(self) -> None:
        """Raises: ConfigError if nothing listens there; Ray itself would try for minutes."""
        host, separator, port = (self.address or "").rpartition(":")
        if separator and "/" not in host and port.isdigit():
            try:
                socket.create_connection((host, int(port)), timeout=10).close()
            except OSError as error:
                raise ConfigError(f"no Ray cluster at {self.address}: {error.strerror or error}") from error

    def _run(self, ray: Any, work: Work, vae: "AutoencoderKL", units: Sequence[int]) -> Iterator[Event]:
        gpus = (
            1 if self.device.startswith("cuda") or (ray.cluster_resources().get("GPU") and self.device == "auto") else 0
        )
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)(_make_unit)
        key = f"{work.plan.fingerprint.digest} {work.plan.generation} {time.time_ns()}"
        # In a list: a reference that is an argument itself would be fetched anew for each task.
        shared = [ray.put((work, vae.to("cpu"), self.device))]
        numbers = {task.remote(key, shared, number): number for number in units}
        failures: list[SumizomeError] = []
        while numbers:
            (ready, _) = ray.wait(list(numbers), timeout=_POLL_SECONDS)
            for reference in ready:
                number = numbers.pop(reference)
                try:
                    event = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, SumizomeError):
                        raise
                    failures.append(error.cause)
                    continue
                if event is None:  # in the hands of another `sumizome prepare`
                    time.sleep(_POLL_SECONDS)
                    numbers[task.remote(key, shared, number)] = number
                else:
                    yield event
            if not ready:
                yield Event()
        if failures:
            raise failures[0]


def _make_unit(key: str, shared: list[Any], number: int) -> Event | None:
    """One unit, in a Ray worker; None if somebody else is at it."""
    import ray

    if key not in _loaded:
        _loaded.clear()
        work, vae, device = ray.get(shared[0])
        _loaded[key] = work, vae.to(choose_device(device))
    work, vae = _loaded[key]
    total = Event()
    for event in work_through(work, vae, [number], wait=False):
        total = replace(
            total,
            written=total.written + event.written,
            rejected=total.rejected + event.rejected,
            by_others=total.by_others + event.by_others,
            vae_seconds=total.vae_seconds + event.vae_seconds,
        )
    return total if work.is_done(number) else None
