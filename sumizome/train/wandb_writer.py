"""A run's numbers and pictures in Weights & Biases, for those who install `sumizome[wandb]`.

One run directory is one wandb run: its id is kept there, so that a resume goes on with it. WANDB_MODE=offline keeps
everything below run_dir/wandb (`wandb sync` sends it later); keys and accounts are wandb's own business.
"""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sumizome.errors import ConfigError, StoreError

__all__ = ["WandbWriter", "check_wandb"]


def check_wandb(project: str) -> None:
    """Raises: ConfigError if wandb is not installed."""
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"wandb = '{project}' needs wandb ({error}); run `pip install 'sumizome[wandb]'`") from error


class WandbWriter:
    """Writes to one wandb run; `close` it."""

    def __init__(self, run_dir: Path, project: str, settings: Mapping[str, Any]) -> None:
        """Raises: OSError, StoreError if wandb does not begin the run."""
        import wandb

        path = run_dir / "wandb-run-id.txt"
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=run_dir.name,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(run_dir),
                config=dict(settings),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise StoreError(
                f"it does not begin the run: {_first_line(error)}; log in with `wandb login` or set "
                "WANDB_MODE=offline, and the next start tries again"
            ) from error
        self._image, self._error = wandb.Image, wandb.errors.Error
        # Our own step: wandb's may only grow, and a resume goes back to its checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the values of a step. Raises: OSError, StoreError when wandb does not take them."""
        with self._told():
            self._run.log({"step": step, **scalars})

    def write_image(self, step: int, name: str, image: Any) -> None:
        """Records a picture [H, W, 3] uint8. Raises: as `write`."""
        with self._told():
            self._run.log({"step": step, name: self._image(image)})

    def close(self) -> None:
        """Ends the run's session. Raises: as `write`."""
        with self._told():
            self._run.finish()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise StoreError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
