"""Every failure that a user can cause, as one tree.

    SumizomeError
    ├── ConfigError            a setting: unknown key, value out of range, two settings that exclude each other
    ├── DataError              the user's pictures and what was made from them
    │   ├── ImageRejected      one picture that cannot be used, and why (in `data.images`): a row of a reject table
    │   ├── ManifestError      a manifest that is missing, damaged or of another version
    │   └── ShardError         latent shards: digest mismatch, fingerprint of another VAE, half-written unit
    ├── ModelError             model files: unknown layout, missing or foreign keys, damaged header
    ├── StoreError             a folder or an object store that cannot be read or written: what, where, how often tried
    ├── CheckpointError        a run directory or one of its checkpoints
    ├── NonFiniteError         NaN or infinity in a loss or a gradient: names the step and the samples
    └── ExportError            an export that did not read back as it was written

The message is one sentence or two: what was expected, what was found (path, key, number), what to do. The command
line prints it in one line and exits with status 2. Anything else that escapes is a bug and shows its traceback.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "ManifestError",
    "ModelError",
    "NonFiniteError",
    "ShardError",
    "StoreError",
    "SumizomeError",
]


class SumizomeError(Exception):
    """The root: catch this to handle every failure that the user can mend."""


class ConfigError(SumizomeError):
    """A setting is unknown, out of range or at odds with another."""


class DataError(SumizomeError):
    """The user's pictures, or a file that was made from them, cannot be used."""


class ManifestError(DataError):
    """A manifest is missing, damaged or was written by another version."""


class ShardError(DataError):
    """Latent shards are damaged, incomplete or were made by something else than what reads them."""


class StoreError(SumizomeError):
    """A folder or an object store cannot be read or written. Never holds a credential."""


class ModelError(SumizomeError):
    """A model file or folder is not one that can be read as SDXL."""


class CheckpointError(SumizomeError):
    """A run directory or a checkpoint in it cannot be used."""


class NonFiniteError(SumizomeError):
    """A loss or a gradient is NaN or infinite."""


class ExportError(SumizomeError):
    """What was exported does not read back as it was written."""
