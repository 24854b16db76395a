"""A corrected copy of a model: marks, metadata, dtype, VAE and layout put right, tensor by tensor.

Owns the streamed copy; what it must say is `mend_decision`'s, its metadata and the words about it are `mend_words`',
what programs need beside the weights `export_metadata`'s. The source is never written to; the copy has a temporary name
until it has been read back and has denoised one step as the source does. Memory: one tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.errors import ExportError, ModelError
from sumizome.export import file_settings
from sumizome.export_check import TORCH_DTYPES, cast_weight, check_step, read_back, step_source
from sumizome.export_metadata import check_sidecar, commit_with_sidecar, sidecar_path
from sumizome.files import folder_committed
from sumizome.inspection import Findings, inspect_model
from sumizome.mend_decision import MendConfig, betas_of, check_kept, check_place, check_source, decide, is_file
from sumizome.mend_words import changes_of, copied_metadata
from sumizome.merge_words import with_other_vae
from sumizome.models.architecture import SDXL_SCALE, Config, latent_scale
from sumizome.models.diffusers_folder import folder_key, write_small_files
from sumizome.models.expected import expected_original
from sumizome.models.folder_files import read_index, read_json, weights_path
from sumizome.models.key_map import NETWORK_PREFIXES, KeyRule, to_original
from sumizome.models.network_stream import Network, network_from_file, network_from_folder, open_vae
from sumizome.models.networks import build_network
from sumizome.models.one_step import StepSource
from sumizome.models.prediction_marks import prediction_markers
from sumizome.models.sdxl import SDXLModel
from sumizome.models.stored_names import unet_prefix_left_out
from sumizome.models.tensor_writer import TensorJob, job_of, write_tensors
from sumizome.models.unseen_settings import (
    PIPELINE_OF_ZEROS,
    says_zeros,
    settings_metadata,
    settings_words,
    stated_settings,
)

__all__ = ["Mended", "Source", "mend_model", "open_source", "write_copy"]


@dataclass(frozen=True)
class Mended:
    """What was written."""

    path: Path
    sidecar: Path | None
    changes: tuple[str, ...]
    """What differs from the source, a phrase each."""
    bytes: int
    told: tuple[str, ...] = ()
    """What other programs will not read in it, a phrase each."""


def mend_model(source: Path, out: Path, config: MendConfig | None = None, *, overwrite: bool = False) -> Mended:
    """Writes the corrected copy of `source` at `out`: one file if that ends in .safetensors, else a diffusers folder.

    Raises: ModelError if the source is damaged, incomplete or no SDXL; ConfigError if nothing tells what only a flag
    can decide, or the flags exclude each other; ExportError if `out` exists or is the source, a weight overflows
    the dtype, or the copy does not read back.
    """
    config = config or MendConfig()
    check_place(source, out, overwrite)
    if config.vae is not None:
        check_kept(config.vae, out)
    return write_copy(open_source(source, config, as_file=is_file(out)), out, config)


@dataclass(frozen=True)
class Source:
    """A model on disk whose statement is settled, ready to be copied."""

    findings: Findings
    networks: "list[Network]"
    prediction_type: PredictionType
    zero_terminal_snr: bool
    metadata: Mapping[str, str]
    """What a copy in one file carries over."""


def open_source(path: Path, config: MendConfig, *, as_file: bool = True) -> Source:
    """The model at `path`, checked and with what it says settled; no weight is read yet.

    Raises: ModelError and ConfigError as `mend_model` does.
    """
    findings = inspect_model(path)
    check_source(findings, config, as_file)
    metadata = with_other_vae(findings.metadata, config.vae) if config.vae else findings.metadata
    return Source(findings, _open_networks(findings, config), *decide(findings, config), metadata)


def write_copy(source: Source, out: Path, config: MendConfig) -> Mended:
    """Writes what `source` holds, tensor by tensor, and reads it back.

    Raises: ExportError as `mend_model` does.
    """
    betas = betas_of(source.findings)
    model = _model(source.networks, source.prediction_type, source.zero_terminal_snr, betas)
    write = _write_file if is_file(out) else _write_folder
    return write(source, model, out, config)


def _open_networks(findings: Findings, config: MendConfig) -> list[Network]:
    networks = []
    for part in findings.components:
        if part.name == "vae" and config.vae is not None:
            continue
        if findings.layout == "folder":
            networks.append(network_from_folder(part.name, findings.path / part.name))
        else:
            strip = unet_prefix_left_out(findings.headers[0].tensors)
            networks.append(network_from_file(part.name, findings.path, strip))
    if config.vae is not None:
        networks.insert(1, _fitting_vae(findings, config.vae))
    return networks


def _fitting_vae(findings: Findings, path: Path) -> Network:
    """The VAE at `path`. Raises: ModelError if it scales latents otherwise than the source's, which the U-Net knows."""
    vae, own = open_vae(path), SDXL_SCALE
    if findings.layout == "folder" and (findings.path / "vae").is_dir():
        own = latent_scale(read_json(findings.path / "vae" / "config.json", "SDXL's vae belongs there"))
    if latent_scale(vae.config) != own:
        raise ModelError(
            f"{path} scales latents otherwise than the VAE of {findings.path}, so that the U-Net's would be decoded "
            "wrongly: use a VAE that was made for this model."
        )
    return vae


def _model(
    networks: list[Network], prediction_type: PredictionType, zero_terminal_snr: bool, betas: Config
) -> SDXLModel:
    """The model without its weights: what `export` needs to write everything that stands beside them."""
    built = {network.name: build_network(network.name, network.config, "meta") for network in networks}
    schedule = ScheduleConfig(zero_terminal_snr=zero_terminal_snr, **betas)
    return SDXLModel(built, prediction_type, schedule, source=None)


# --- writing ---------------------------------------------------------------------------------------------------------


def _wanted(network: Network, rule: KeyRule, config: MendConfig) -> torch.dtype:
    return TORCH_DTYPES[config.dtype] if config.dtype else network.dtype(rule)


def _native_tensors(network: Network, rule: KeyRule, config: MendConfig) -> dict[str, Tensor]:
    tensors = network.read(rule)
    if config.dtype:
        return {name: cast_weight(name, tensor, config.dtype) for name, tensor in tensors.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _stored(network: Network, rule: KeyRule, config: MendConfig) -> Tensor:
    return to_original(rule, _native_tensors(network, rule, config))


def _part(network: Network, rule: KeyRule, native: str, config: MendConfig) -> Tensor:
    return _native_tensors(network, rule, config)[native]


def _write_file(source: Source, model: SDXLModel, out: Path, config: MendConfig) -> Mended:
    findings, networks = source.findings, source.networks
    marks = prediction_markers(model.prediction_type, model.schedule_config)
    _check_latent_scale(networks)
    # With a VAE beside it the prefix stays: without, nothing tells where one network ends and the other begins.
    strip = NETWORK_PREFIXES["unet"] if [network.name for network in networks] == ["unet"] else ""
    if not config.noise_table:
        marks.pop("alphas_cumprod", None)
    jobs = [job_of(name, mark) for name, mark in marks.items()]
    for network in networks:
        original = expected_original(network.name, network.config)
        for rule in network.rules:
            name, shape = rule.original.removeprefix(strip), original[rule.original]
            jobs.append(TensorJob(name, _wanted(network, rule, config), shape, partial(_stored, network, rule, config)))
    settings = file_settings(model.networks)
    if findings.layout != "unet" and _zeros_for_empty_prompt(findings):
        settings = {**settings, **PIPELINE_OF_ZEROS}
    metadata = copied_metadata(source.metadata, model, jobs, config, out) | settings_metadata(settings)
    sidecar = sidecar_path(model, out) if findings.layout != "unet" else None
    check_sidecar(out, sidecar, model.prediction_type, overwrite=True)  # `check_place` has asked about overwriting

    def write(file: Path) -> None:
        write_tensors(file, jobs, metadata)
        with read_back():
            _check_step(model, networks, file, config)

    commit_with_sidecar(out, sidecar, write)
    changes = tuple(changes_of(findings, model, jobs, config, set(marks)))
    return Mended(out, sidecar, changes, out.stat().st_size, tuple(settings_words(settings)))


def _write_folder(source: Source, model: SDXLModel, out: Path, config: MendConfig) -> Mended:
    findings, networks = source.findings, source.networks
    own = {network.name: _folder_jobs(network, config) for network in networks}
    with folder_committed(out, failure=ExportError) as folder, read_back():
        write_small_files(
            folder,
            model.networks,
            model.prediction_type,
            model.schedule_config,
            zeros_for_empty_prompt=_zeros_for_empty_prompt(findings),
        )
        for name, jobs in own.items():
            write_tensors(weights_path(folder, name), jobs, {"format": "pt"})
        _check_step(model, networks, folder, config)
    every = [job for jobs in own.values() for job in jobs]
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    return Mended(out, None, tuple(changes_of(findings, model, every, config, None)), size)


def _zeros_for_empty_prompt(findings: Findings) -> bool:
    """What the source's own index says of diffusers' pictures without a negative prompt, which are to stay the same."""
    if findings.layout != "folder":
        return says_zeros(stated_settings(findings.metadata))
    return bool(read_index(findings.path).get("force_zeros_for_empty_prompt", True))  # diffusers' default


def _folder_jobs(network: Network, config: MendConfig) -> list[TensorJob]:
    """The tensors of one network's file; those of a fused rule are read once for each of its parts."""
    jobs = []
    for rule in network.rules:
        for native in rule.native:
            key = native.removeprefix(f"{network.name}.")
            name, dtype = folder_key(network.name, key), _wanted(network, rule, config)
            jobs.append(TensorJob(name, dtype, network.shapes[key], partial(_part, network, rule, native, config)))
    return jobs


def _check_step(model: SDXLModel, networks: list[Network], written: Path, config: MendConfig) -> None:
    """Raises: ExportError unless what was written denoises as the source does, taken for what was decided."""
    unet = next(network for network in networks if network.name == "unet")
    if not config.verify_step:
        return
    rules = {rule.native[0].removeprefix("unet."): rule for rule in unet.rules}

    def read(native: str) -> Tensor:
        return unet.read(rules[native])[f"unet.{native}"]

    source = StepSource(unet.config, read, model.prediction_type, model.schedule_config)
    check_step(source, step_source(written), config.dtype or "fp32")


def _check_latent_scale(networks: list[Network]) -> None:
    for network in networks:
        if network.name == "vae" and (scale := latent_scale(network.config)) != SDXL_SCALE:
            factor, mean, _ = scale
            raise ModelError(
                f"its VAE scales latents by {factor}{' and per channel' if mean else ''}, which a single file cannot "
                "say: `sumizome export`, which folds that into the VAE, makes a file of it."
            )
