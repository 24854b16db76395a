"""Whether a written model is its source: every weight bit for bit, and one denoising step.

Owns casting weights for a file (with the overflow check) and both comparisons, for `export` and `mending`. Each tensor
is compared alone, and the step is run layer by layer: memory stays that of one tensor.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sumizome.errors import ExportError, ModelError
from sumizome.export_metadata import ExportDtype
from sumizome.models.diffusers_folder import open_folder
from sumizome.models.expected import expected_shapes
from sumizome.models.key_map import KeyRule, from_original
from sumizome.models.networks import native_state
from sumizome.models.one_step import STEP_TOLERANCE, StepSource, step_difference
from sumizome.models.sdxl import SDXLModel
from sumizome.models.single_file import open_single_file
from sumizome.models.tensor_file import TensorFile
from sumizome.models.tensor_writer import tensor_bytes

__all__ = [
    "TORCH_DTYPES",
    "cast_weight",
    "check_native",
    "check_step",
    "model_step_source",
    "read_back",
    "step_source",
]

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cast_weight(name: str, tensor: Tensor, dtype: ExportDtype) -> Tensor:
    """The tensor in the export's dtype, on the CPU, contiguous.

    Raises: ExportError if it is not finite, there or already before.
    """
    wanted = TORCH_DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype
    cast = tensor.detach().to("cpu", wanted).contiguous()
    if not torch.isfinite(cast).all():
        if torch.isfinite(tensor).all():
            most = float(tensor.abs().max())
            raise ExportError(f"{name} reaches {most:.3g}, which overflows {dtype}: export as bf16 or fp32.")
        raise ExportError(f"{name} holds NaN or infinity: export an earlier checkpoint.")
    return cast


@contextmanager
def read_back() -> Iterator[None]:
    """Raises: ExportError where reading what was just written raises ModelError."""
    try:
        yield
    except ModelError as error:
        raise ExportError(f"the export did not read back: {error}") from error


def check_native(
    file: TensorFile, rules: list[KeyRule], native: Mapping[str, Tensor], dtype: ExportDtype, strip: str
) -> None:
    """Raises: ExportError unless the file, read as a loader reads it, gives back every native tensor bit for bit."""
    for rule in rules:
        for name, tensor in from_original(rule, file.read(rule.original.removeprefix(strip))).items():
            written = cast_weight(name, native[name], dtype)
            same = written.dtype == tensor.dtype and written.shape == tensor.shape
            if not same or not torch.equal(tensor_bytes(written), tensor_bytes(tensor)):
                raise ExportError(f"{file.path}: {name} did not read back bit for bit. Check the disk and try again.")


def model_step_source(model: SDXLModel) -> StepSource:
    """The U-Net of a model in memory, for one denoising step."""
    return StepSource(
        dict(model.unet.config), native_state(model.unet).__getitem__, model.prediction_type, model.schedule_config
    )


def step_source(path: Path) -> StepSource:
    """The U-Net of a file or folder, with what that says of it. Raises: ModelError as loading does."""
    if path.is_dir():
        folder = open_folder(path)
        return StepSource(folder.config("unet"), folder.reader("unet"), *folder.prediction())
    file = open_single_file(path)
    config = file.config("unet")
    return StepSource(config, file.reader("unet", expected_shapes("unet", config)), *file.prediction())


def check_step(source: StepSource, written: StepSource, dtype: str) -> None:
    """Raises: ExportError unless one denoising step of what was written is the source's, within `STEP_TOLERANCE`."""
    difference = step_difference(source, written)
    if not difference <= STEP_TOLERANCE[dtype]:
        raise ExportError(
            f"one denoising step of what was written differs from the source's by {difference:.2g} of its size, more "
            f"than {STEP_TOLERANCE[dtype]:g}, which is what {dtype} may do: it was not kept. This is a bug of ours, or "
            "a model whose weights need more precision: export as fp32 and report it."
        )
