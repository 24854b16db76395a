"""A run's decoder in the place of a model's, or as a VAE of its own: written as `mend` writes, and read back.

Only the VAE's decoder and `post_quant_conv` differ from the model's own; that its encoder does not is checked before
anything is written. Nothing is written over the source.
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from sumizome.errors import ConfigError, ExportError, ModelError
from sumizome.export_check import TORCH_DTYPES, cast_weight, read_back
from sumizome.export_metadata import ExportDtype
from sumizome.files import folder_committed, write_atomically
from sumizome.mend_decision import MendConfig, check_apart, check_place, is_file
from sumizome.mending import Mended, mend_model
from sumizome.models.architecture import SDXL_SCALE, latent_scale
from sumizome.models.folder_files import read_json
from sumizome.models.vae_file import load_vae, write_vae_file, write_vae_folder
from sumizome.vae.build import encoder_digest

__all__ = ["bake_model", "bake_vae", "check_vae_place"]


def bake_model(vae: AutoencoderKL, model: Path, out: Path, config: MendConfig, *, overwrite: bool = False) -> Mended:
    """A copy of `model` with this VAE at `out`: one file if that ends in .safetensors, else a diffusers folder.

    Raises: ExportError if the model's own encoder is another, so that its latents would not fit, or `out` is taken;
        ModelError, ConfigError as `mending.mend_model` does.
    """
    check_place(model, out, overwrite)
    own = load_vae(model)
    if encoder_digest(own) != encoder_digest(vae):
        raise ExportError(
            f"{model}: its VAE has another encoder than the one that this decoder was finetuned for, so its U-Net's "
            "latents are not the decoder's; give the model that the run began with, or one with the same VAE"
        )
    # How latents are scaled is the model's affair: its U-Net was trained on them so.
    vae = copy.deepcopy(vae)
    vae.register_to_config(**{key: own.config.get(key) for key in ("scaling_factor", "latents_mean", "latents_std")})
    with tempfile.TemporaryDirectory(prefix="sumizome-vae-") as folder:
        try:
            write_vae_folder(vae, Path(folder))
        except OSError as error:
            raise ExportError(
                f"cannot write {folder}: {error.strerror or error}; TMPDIR says where it lies."
            ) from error
        mended = mend_model(model, out, replace(config, vae=Path(folder)), overwrite=overwrite)
    changes = [change for change in mended.changes if not change.startswith("VAE of ")]
    return replace(mended, changes=(*changes, "another decoder and post_quant_conv in the VAE, whose encoder stays"))


def bake_vae(
    vae: AutoencoderKL, source: Path, out: Path, *, dtype: ExportDtype = "fp32", overwrite: bool = False
) -> Path:
    """The VAE alone at `out`: one file in the original layout if that ends in .safetensors, else a diffusers folder.

    Raises: ExportError if `out` is taken, a weight overflows the dtype, or it does not read back. ConfigError if a file
        cannot say how the VAE scales its latents.
    """
    check_vae_place(source, out, overwrite)
    stored = _in_dtype(vae, dtype)
    if is_file(out):
        if latent_scale(dict(vae.config)) != SDXL_SCALE:
            raise ConfigError(f"{out}: a file cannot say that latents are scaled otherwise than SDXL's; give a folder")
        write_atomically(out, lambda file: _write_file(stored, file), failure=ExportError)
    else:
        with folder_committed(out, failure=ExportError) as folder, read_back():
            write_vae_folder(stored, folder)
            _check(stored, folder)
    return out


def check_vae_place(source: Path, out: Path, overwrite: bool) -> None:
    """Raises: ExportError if `out` is taken, or belongs to the model at `source`, which the run goes on from."""
    if is_file(out):
        check_place(source, out, overwrite)
        return
    check_apart(source, out)
    if out.exists() and not overwrite:
        raise ExportError(f"{out} exists: choose another path, or give --overwrite.")
    if out.exists() and not _holds_vae(out):
        raise ExportError(f"{out} holds no diffusers VAE, so it is not replaced. Choose another path.")


def _holds_vae(folder: Path) -> bool:
    """Many folders have a config.json; the folder is replaced whole."""
    try:
        return bool(read_json(folder / "config.json", "a VAE has one").get("_class_name") == "AutoencoderKL")
    except ModelError:
        return False


def _in_dtype(vae: AutoencoderKL, dtype: ExportDtype) -> AutoencoderKL:
    for name, tensor in vae.state_dict().items():
        cast_weight(name, tensor, dtype)  # raises where it overflows
    # Not AutoencoderKL's own `to`, which warns of a conversion that is meant.
    return nn.Module.to(copy.deepcopy(vae), "cpu", TORCH_DTYPES[dtype])


def _write_file(vae: AutoencoderKL, file: Path) -> None:
    with read_back():
        write_vae_file(vae, file)
        _check(vae, file)


def _check(vae: AutoencoderKL, written: Path) -> None:
    """Raises: ExportError unless what was written loads as the same weights."""
    back = load_vae(written).state_dict()
    wrong = [name for name, tensor in vae.state_dict().items() if not torch.equal(tensor.float(), back[name])]
    if wrong:
        raise ExportError(f"{written}: {wrong[0]} did not read back bit for bit. Check the disk and try again.")
