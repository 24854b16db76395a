"""A corrected copy of a model: marks, metadata, dtype, VAE and layout put right, tensor by tensor.

Owns the decision what a file must say (and the refusal where nothing tells), and the streamed copy. What the
programs need beside the weights is `export`'s. The source is never written to; the copy has a temporary name
until it has been read back, so that a half-written one never stands under the final name. Memory: one tensor.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.errors import ConfigError, ExportError, ModelError
from sumizome.export import (
    TORCH_DTYPES,
    ExportDtype,
    ModelCard,
    cast_weight,
    folder_committed,
    model_metadata,
    read_back,
    sidecar_path,
    tensor_bytes,
    write_sidecar,
)
from sumizome.files import write_atomically
from sumizome.inspection import MARKS, Findings, file_configs, folder_files, inspect_model, native_name, sidecar_of
from sumizome.models.architecture import SDXL_SCALING_FACTOR, Config
from sumizome.models.diffusers_folder import folder_key, weights_path, write_small_files
from sumizome.models.expected import expected_original, expected_shapes
from sumizome.models.key_map import NETWORK_PREFIXES, KeyRule, from_original, key_rules, to_original
from sumizome.models.networks import build_network
from sumizome.models.sdxl import SDXLModel
from sumizome.models.single_file import prediction_markers
from sumizome.models.tensor_file import TensorFile, open_tensor_file
from sumizome.models.tensor_header import read_header

__all__ = [
    "MendConfig",
    "Mended",
    "Network",
    "Source",
    "check_place",
    "mend_model",
    "open_source",
    "write_copy",
]


@dataclass(frozen=True)
class MendConfig:
    """What to put right. None: as the source says."""

    prediction: Literal["v", "epsilon"] | None = None
    """What the U-Net was trained to predict."""
    zero_terminal_snr: bool | None = None
    """Whether it was trained to pure noise."""
    dtype: ExportDtype | None = None
    """Of all weights in the copy; None keeps each tensor's own."""
    vae: Path | None = None
    """A model or a VAE whose VAE the copy gets."""
    noise_table: bool = True
    """Write the rescaled `alphas_cumprod` into a single file, the only way to pure noise in stable-diffusion.cpp."""
    title: str | None = None
    """Of the copy, in its metadata; None keeps the source's."""


@dataclass(frozen=True)
class Mended:
    """What was written."""

    path: Path
    sidecar: Path | None
    changes: tuple[str, ...]
    """What differs from the source, a phrase each."""
    bytes: int


def mend_model(source: Path, out: Path, config: MendConfig | None = None, *, overwrite: bool = False) -> Mended:
    """Writes the corrected copy of `source` at `out`: one file if that ends in .safetensors, else a diffusers folder.

    Raises: ModelError if the source is damaged, incomplete or no SDXL; ConfigError if nothing tells what only a flag
    can decide, or the flags exclude each other; ExportError if `out` exists or is the source, a weight overflows
    the dtype, or the copy does not read back.
    """
    config = config or MendConfig()
    check_place(source, out, overwrite)
    return write_copy(open_source(source, config, as_file=_is_file(out)), out, config)


@dataclass(frozen=True)
class Source:
    """A model on disk whose statement is settled, ready to be copied."""

    findings: Findings
    networks: "list[Network]"
    prediction_type: PredictionType
    zero_terminal_snr: bool


def open_source(path: Path, config: MendConfig, *, as_file: bool = True) -> Source:
    """The model at `path`, checked and with what it says settled; no weight is read yet.

    Raises: ModelError and ConfigError as `mend_model` does.
    """
    findings = inspect_model(path)
    _check_source(findings, config, as_file)
    return Source(findings, _open_networks(findings, config), *_decide(findings, config))


def write_copy(source: Source, out: Path, config: MendConfig) -> Mended:
    """Writes what `source` holds, tensor by tensor, and reads it back.

    Raises: ExportError as `mend_model` does.
    """
    betas = _betas_of(source.findings)
    model = _model(source.networks, source.prediction_type, source.zero_terminal_snr, betas)
    write = _write_file if _is_file(out) else _write_folder
    return write(source.findings, model, source.networks, out, config)


def _is_file(out: Path) -> bool:
    return out.suffix == ".safetensors"


# --- what may be mended, and what the copy has to say ----------------------------------------------------------------


def _check_source(findings: Findings, config: MendConfig, as_file: bool) -> None:
    path = findings.path
    if findings.layout is None:
        raise ModelError(f"{path} cannot be mended: {findings.kind}.")
    if findings.layout == "unet" and not as_file:
        raise ModelError(f"{path} is a U-Net alone, and a diffusers folder needs every network: use --out FILE.")
    if findings.layout == "unet" and config.vae is not None:
        raise ConfigError(f"{path} is a U-Net alone: a VAE in the same file would not be found. Leave --vae out.")
    for part in findings.components:
        if part.name == "vae" and config.vae is not None:
            continue
        wrong = part.missing or part.misshapen
        if wrong:
            raise ModelError(
                f"{path}: {part.name} lacks {len(part.missing)} tensors and {len(part.misshapen)} have another shape "
                f"({wrong[0]} for one); weights cannot be invented. Use another copy of the model."
            )
    if findings.layout != "unet":
        held = {part.name for part in findings.components} | ({"vae"} if config.vae else set())
        lost = [name for name in NETWORK_PREFIXES if name not in held]
        if lost:
            advice = "give one with --vae" if lost == ["vae"] else "use the full model"
            raise ModelError(f"{path} has no {' and no '.join(lost)}: {advice}.")


def check_place(source: Path, out: Path, overwrite: bool) -> None:
    """Raises: ExportError if `out` is the source, or exists and may not be replaced."""
    if out.exists() and out.samefile(source):
        raise ExportError(f"{out} is the source itself: the new model needs a path of its own.")
    if out.suffix in (".ckpt", ".pt", ".pth", ".bin", ".sft", ".gguf"):
        raise ExportError(f"{out}: a single file must end in .safetensors; any other name makes a diffusers folder.")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ExportError(f"{out} lies inside the source: the new model needs a path of its own.")
    for path in [out, out.with_suffix(".yaml")] if _is_file(out) else [out]:
        if path.exists() and not overwrite:
            raise ExportError(f"{path} exists: choose another path, or give --overwrite.")
    if not _is_file(out) and out.exists() and not (out / "model_index.json").is_file():
        raise ExportError(f"{out} holds no diffusers model, so it is not replaced. Choose another path.")


def _decide(findings: Findings, config: MendConfig) -> tuple[PredictionType, bool]:
    """(prediction type, terminal SNR): the flags, else what the source says if all of it agrees.

    Raises: ConfigError naming the flag that decides what the source does not.
    """
    prediction_type = _decide_prediction(findings, config)
    zero_terminal_snr = _decide_schedule(findings, config, prediction_type)
    if zero_terminal_snr and prediction_type != "v_prediction":
        raise ConfigError(
            f"zero terminal SNR needs v-prediction, and {findings.path} is taken for {prediction_type}: at pure noise "
            "an epsilon model has nothing to predict. Add --prediction v, or --no-zero-terminal-snr."
        )
    return prediction_type, zero_terminal_snr


def _decide_prediction(findings: Findings, config: MendConfig) -> PredictionType:
    if config.prediction is not None:
        return "v_prediction" if config.prediction == "v" else "epsilon"
    told = [evidence for evidence in findings.evidence if evidence.prediction_type]
    spoken = [evidence for evidence in told if not evidence.source.startswith("nothing")]
    against = [evidence.source for evidence in spoken if evidence.prediction_type != findings.prediction_type]
    if not spoken:
        raise ConfigError(
            f"nothing in {findings.path} says what its U-Net predicts: give --prediction v or --prediction epsilon."
        )
    found = findings.prediction_type
    if found is None or found == "EDM":
        raise ConfigError(
            f"{findings.path} is marked as an EDM model, which SDXL is not: --prediction v or --prediction epsilon "
            "says what it is and removes the marks."
        )
    if against:
        raise ConfigError(
            f"{findings.path} is read as {found}, and {against[0]} contradicts that: give --prediction v or "
            "--prediction epsilon."
        )
    return found


def _decide_schedule(findings: Findings, config: MendConfig, prediction_type: PredictionType) -> bool:
    if config.zero_terminal_snr is not None:
        return config.zero_terminal_snr
    if prediction_type == "epsilon":
        return False
    spoken = [evidence for evidence in findings.evidence if evidence.zero_terminal_snr is not None]
    spoken = [evidence for evidence in spoken if evidence.prediction_type in (None, prediction_type)]
    said = {bool(evidence.zero_terminal_snr) for evidence in spoken if not evidence.source.startswith("nothing")}
    if findings.layout == "folder" and not said:
        said = {False}  # a scheduler config without the flag is a statement; a file without a mark is none
    if len(said) != 1:
        why = "contradicts itself about" if said else "does not say"
        raise ConfigError(
            f"{findings.path} {why} whether it was trained to pure noise: give --zero-terminal-snr (most v-prediction "
            "SDXL models were) or --no-zero-terminal-snr."
        )
    return said.pop()


def _betas_of(findings: Findings) -> Config:
    """The betas that a folder states; SDXL's for a file, which has no place for others."""
    if findings.layout != "folder":
        return {}
    config = json.loads((findings.path / "scheduler" / "scheduler_config.json").read_bytes())
    if config.get("beta_schedule", "scaled_linear") != "scaled_linear":
        raise ModelError(f"{findings.path}: beta_schedule {config['beta_schedule']!r}, expected scaled_linear.")
    names = {"beta_start": "beta_start", "beta_end": "beta_end", "num_train_timesteps": "num_timesteps"}
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


# --- networks as streams of tensors ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """One network of the source: its rules, and how to read the native tensors of a rule."""

    name: str
    config: Config
    rules: list[KeyRule]
    shapes: Mapping[str, tuple[int, ...]]
    """By native name, without the network's."""
    dtype: Callable[[KeyRule], torch.dtype]
    read: Callable[[KeyRule], dict[str, Tensor]]


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SHORT = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


def _open_networks(findings: Findings, config: MendConfig) -> list[Network]:
    networks = []
    for part in findings.components:
        if part.name == "vae" and config.vae is not None:
            continue
        if findings.layout == "folder":
            networks.append(_from_folder(part.name, findings.path / part.name))
        else:
            prefix = NETWORK_PREFIXES[part.name]
            bare = findings.layout == "unet" and not any(n.startswith(prefix) for n in findings.headers[0].tensors)
            networks.append(_from_file(part.name, findings.path, strip=prefix if bare else ""))
    if config.vae is not None:
        networks.insert(1, _open_vae(config.vae))
    return networks


def _from_file(name: str, path: Path, strip: str = "") -> Network:
    """From the original layout. `strip`: the part of the layout's names that this file leaves out."""
    prefix = NETWORK_PREFIXES[name]
    header, file = read_header(path), open_tensor_file(path)
    shapes = {strip + key: entry.shape for key, entry in header.tensors.items() if (strip + key).startswith(prefix)}
    config = file_configs(name, shapes)
    lost = set(expected_original(name, config)) - set(shapes)
    if lost:
        raise ModelError(f"{path}: {name} lacks {len(lost)} tensors, {min(lost)} for one. Use another copy.")
    native = expected_shapes(name, config)

    def dtype(rule: KeyRule) -> torch.dtype:
        return _float_dtype(path, header.tensors[rule.original.removeprefix(strip)].dtype)

    def read(rule: KeyRule) -> dict[str, Tensor]:
        return from_original(rule, _read(file, rule.original.removeprefix(strip)))

    return Network(name, config, key_rules(name, native), native, dtype, read)


def _from_folder(name: str, folder: Path) -> Network:
    config = json.loads((folder / "config.json").read_bytes())
    return _from_native(name, folder_files(folder, name), config)


def _from_native(name: str, paths: list[Path], config: Config) -> Network:
    places = {}
    for path in paths:
        header, file = read_header(path), open_tensor_file(path)
        for key, entry in header.tensors.items():
            places[native_name(name, key)] = (file, key, entry.dtype)
    native = expected_shapes(name, config)
    lost = set(native) - set(places)
    if lost:
        raise ModelError(f"{paths[0].parent}: {name} lacks {len(lost)} tensors, {min(lost)} for one. Use another copy.")

    def parts(rule: KeyRule) -> list[tuple[str, tuple[TensorFile, str, str]]]:
        return [(key, places[key.split(".", 1)[1]]) for key in rule.native]

    def dtype(rule: KeyRule) -> torch.dtype:
        found = [_float_dtype(file.path, stored) for _, (file, _, stored) in parts(rule)]
        return found[0] if len(set(found)) == 1 else torch.float32

    def read(rule: KeyRule) -> dict[str, Tensor]:
        together = dtype(rule)
        return {
            native: _read(file, key).reshape(expected_shapes_of[native.split(".", 1)[1]]).to(together)
            for native, (file, key, _) in parts(rule)
        }

    expected_shapes_of = native
    return Network(name, config, key_rules(name, native), native, dtype, read)


def _open_vae(path: Path) -> Network:
    """The VAE of a model (file or folder), of a diffusers VAE folder, or of a file that holds a VAE alone.

    Raises: ModelError if there is none, or its latents are scaled otherwise than SDXL's.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} holds no diffusers VAE: there is no config.json. Give a VAE or a whole model.")
        return _from_folder("vae", folder)
    names = read_header(path).tensors
    if any(name.startswith(NETWORK_PREFIXES["vae"]) for name in names):
        return _from_file("vae", path)
    if any(name.startswith("encoder.down_blocks.") for name in names):
        return _from_native("vae", [path], _config_of_native_vae(path))
    if "encoder.conv_in.weight" in names:
        return _from_file("vae", path, strip=NETWORK_PREFIXES["vae"])
    raise ModelError(f"{path} holds no VAE. Give a file with first_stage_model.* or encoder.* and decoder.* tensors.")


def _config_of_native_vae(path: Path) -> Config:
    shapes = {native_name("vae", key): entry.shape for key, entry in read_header(path).tensors.items()}
    try:
        rules = key_rules("vae", shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"{path}: its VAE has tensors that SDXL's does not ({error}).") from error
    return file_configs("vae", {rule.original: shapes[rule.native[0].split(".", 1)[1]] for rule in rules})


def _read(file: TensorFile, name: str) -> Tensor:
    try:
        return file.read(name)
    except ModelError as error:
        raise ExportError(f"{error}") from error


def _float_dtype(path: Path, stored: str) -> torch.dtype:
    if stored not in _DTYPES:
        raise ModelError(f"{path}: weights of dtype {stored} are quantised in a way that is not known here.")
    return _DTYPES[stored]


def _model(
    networks: list[Network], prediction_type: PredictionType, zero_terminal_snr: bool, betas: Config
) -> SDXLModel:
    """The model without its weights: what `export` needs to write everything that stands beside them."""
    built = {network.name: build_network(network.name, network.config, "meta") for network in networks}
    encoders = [built[name] for name in ("text_encoder", "text_encoder_2") if name in built]
    schedule = ScheduleConfig(zero_terminal_snr=zero_terminal_snr, **betas)
    return SDXLModel(
        built["unet"], built.get("vae"), nn.ModuleList(encoders) if encoders else None, prediction_type, schedule, None
    )


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One tensor to write: what the header says of it, and how to make it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _write_verified(path: Path, jobs: list[_Job], metadata: dict[str, str]) -> None:
    """A safetensors file, one tensor in memory at a time, read back. Wider dtypes come first, so that all are aligned.

    `metadata`'s modelspec.hash_sha256, if there is one, is filled in when the data is known.
    Raises: ExportError unless header, metadata and every byte read back as they were written.
    """
    jobs = sorted(jobs, key=lambda job: -job.dtype.itemsize)
    digests, whole = {}, hashlib.sha256()
    with path.open("w+b") as file:
        file.write(_header(jobs, metadata))
        for job in jobs:
            tensor = job.make()
            if (tensor.dtype, tuple(tensor.shape)) != (job.dtype, job.shape):
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ExportError(f"{job.name} is {found}, expected {job.dtype} {job.shape}: the source is damaged.")
            data = tensor_bytes(tensor).numpy().data
            file.write(data)
            whole.update(data)
            digests[job.name] = hashlib.sha256(data).digest()
        if "modelspec.hash_sha256" in metadata:
            metadata["modelspec.hash_sha256"] = f"0x{whole.hexdigest()}"
            file.seek(0)
            file.write(_header(jobs, metadata))
    with read_back():
        _verify(path, jobs, metadata, digests)


def _header(jobs: list[_Job], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    reached = 0
    for job in jobs:
        stop = reached + job.dtype.itemsize * math.prod(job.shape)
        header[job.name] = {"dtype": _NAMES[job.dtype], "shape": list(job.shape), "data_offsets": [reached, stop]}
        reached = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data begins on a multiple of eight bytes
    return len(raw).to_bytes(8, "little") + raw


def _verify(path: Path, jobs: list[_Job], metadata: dict[str, str], digests: Mapping[str, bytes]) -> None:
    header, file = read_header(path), open_tensor_file(path)
    found = {name: (_DTYPES[entry.dtype], entry.shape) for name, entry in header.tensors.items()}
    if found != {job.name: (job.dtype, job.shape) for job in jobs} or header.metadata != metadata:
        raise ExportError(f"{path}: the header did not read back as it was written.")
    for name, digest in digests.items():
        if hashlib.sha256(tensor_bytes(file.read(name)).numpy().data).digest() != digest:
            raise ExportError(f"{path}: {name} did not read back bit for bit. Check the disk and try again.")


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


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _write_file(findings: Findings, model: SDXLModel, networks: list[Network], out: Path, config: MendConfig) -> Mended:
    marks = prediction_markers(model.prediction_type, model.schedule_config)
    _check_latent_scale(networks)
    strip = NETWORK_PREFIXES["unet"] if findings.layout == "unet" else ""
    if not config.noise_table:
        marks.pop("alphas_cumprod", None)
    jobs = [_Job(name, mark.dtype, tuple(mark.shape), partial(_same, mark)) for name, mark in marks.items()]
    for network in networks:
        original = expected_original(network.name, network.config)
        for rule in network.rules:
            name, shape = rule.original.removeprefix(strip), original[rule.original]
            jobs.append(_Job(name, _wanted(network, rule, config), shape, partial(_stored, network, rule, config)))
    metadata = _metadata(findings, model, jobs, config, out)
    sidecar = sidecar_path(model, out) if findings.layout != "unet" else None
    if sidecar is None and sidecar_of(out)[1] not in (None, model.prediction_type):
        raise ExportError(f"{out.with_suffix('.yaml')} would make programs read {out.name} wrongly: remove it first.")
    write_atomically(out, lambda file: _write_verified(file, jobs, metadata), failure=ExportError)
    if sidecar:
        write_sidecar(sidecar)
    return Mended(out, sidecar, tuple(_changes(findings, model, jobs, config, set(marks))), out.stat().st_size)


def _write_folder(
    findings: Findings, model: SDXLModel, networks: list[Network], out: Path, config: MendConfig
) -> Mended:
    own = {network.name: _folder_jobs(network, config) for network in networks}
    with folder_committed(out) as folder:
        write_small_files(folder, model.networks(), model.prediction_type, model.schedule_config)
        for name, jobs in own.items():
            _write_verified(weights_path(folder, name), jobs, {"format": "pt"})
    every = [job for jobs in own.values() for job in jobs]
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    return Mended(out, None, tuple(_changes(findings, model, every, config, set())), size)


def _folder_jobs(network: Network, config: MendConfig) -> list[_Job]:
    """The tensors of one network's file; those of a fused rule are read once for each of its parts."""
    jobs = []
    for rule in network.rules:
        for native in rule.native:
            key = native.removeprefix(f"{network.name}.")
            name, dtype = folder_key(network.name, key), _wanted(network, rule, config)
            jobs.append(_Job(name, dtype, network.shapes[key], partial(_part, network, rule, native, config)))
    return jobs


def _check_latent_scale(networks: list[Network]) -> None:
    for network in networks:
        if network.name != "vae":
            continue
        factor, mean = network.config.get("scaling_factor", SDXL_SCALING_FACTOR), network.config.get("latents_mean")
        if factor != SDXL_SCALING_FACTOR or mean:
            raise ModelError(
                f"its VAE scales latents by {factor}{' and per channel' if mean else ''}, which a single file cannot "
                "say: `sumizome export`, which folds that into the VAE, makes a file of it."
            )


# --- words -----------------------------------------------------------------------------------------------------------

_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.predict_key")
"""Metadata of the source that is no longer true of a copy, or that the copy says in another place."""


def _metadata(findings: Findings, model: SDXLModel, jobs: list[_Job], config: MendConfig, out: Path) -> dict[str, str]:
    """The source's metadata, with everything that programs go by put right."""
    kept = {key: value for key, value in findings.metadata.items() if key not in _STALE}
    if "ss_zero_terminal_snr" in kept:
        kept["ss_zero_terminal_snr"] = str(model.schedule_config.zero_terminal_snr)
    title = config.title or kept.get("modelspec.title") or out.stem
    networks = [job for job in jobs if "." in job.name]
    dtype = _SHORT[_NAMES[networks[0].dtype]]
    ours = model_metadata(model, ModelCard(title=title), dtype, "0" * 64)  # type: ignore[arg-type]
    for key in ("modelspec.resolution", "modelspec.date"):
        ours[key] = kept.get(key, ours[key])
    vae = [job for job in jobs if job.name.startswith(NETWORK_PREFIXES["vae"])]
    if vae:
        ours["modelspec.vae_dtype"] = _SHORT[_NAMES[vae[0].dtype]]
    return kept | ours


def _changes(
    findings: Findings, model: SDXLModel, jobs: list[_Job], config: MendConfig, marks: set[str]
) -> Iterator[str]:
    schedule = "zero terminal SNR" if model.schedule_config.zero_terminal_snr else "SDXL's own schedule"
    said = (model.prediction_type, model.schedule_config.zero_terminal_snr)
    was = (findings.prediction_type, findings.zero_terminal_snr)
    yield f"says {model.prediction_type}, {schedule}{'' if said == was else ' (the source was read otherwise)'}"
    before = {name for header in findings.headers for name in header.tensors}
    if marks - before:
        yield f"adds {', '.join(sorted(marks - before))}"
    if config.dtype:
        yield f"weights in {config.dtype}, none overflows"
    if config.vae:
        yield f"VAE of {config.vae}"
    foreign = [name for part in findings.components for name in part.foreign]
    known = {*MARKS, "alphas_cumprod"}
    left = [*foreign, *(name for name in findings.ignored if name not in known)]
    if left:
        yield f"leaves out what is no part of SDXL: {len(left):,} tensors, {left[0]} for one"
    gone = sorted(known.intersection(findings.ignored) - marks)
    if gone:
        yield f"leaves out {', '.join(gone)}"
