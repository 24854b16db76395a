"""Models put together: a weighted mean, or a base with the difference of two others added.

Owns the arithmetic, in float32, one tensor at a time. What the result says of its parents is `merge_words`'; reading
and writing are `mending`'s, so that the result keeps every mark and reads back bit for bit. The VAE is the first
model's: the mean of two VAEs is neither's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.errors import ConfigError, ExportError, ModelError
from sumizome.export_check import TORCH_DTYPES
from sumizome.export_metadata import ExportDtype
from sumizome.inspection import Findings
from sumizome.mend_decision import MendConfig, betas_of, check_place, decide
from sumizome.mending import Mended, Source, open_source, write_copy
from sumizome.merge_words import merged_metadata, with_other_vae
from sumizome.models.architecture import Config, latent_scale
from sumizome.models.diffusers_folder import network_config
from sumizome.models.key_map import KeyRule
from sumizome.models.network_stream import Network
from sumizome.models.networks import build_network
from sumizome.models.unseen_settings import drawing_settings, unseen_settings

__all__ = ["Merged", "add_difference", "merge_weighted"]

Combine = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Merged:
    """What was written, and what the user should know about it."""

    mended: Mended
    warnings: tuple[str, ...]


def merge_weighted(
    paths: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    config: MendConfig | None = None,
    *,
    overwrite: bool = False,
) -> Merged:
    """Σ wᵢ·modelᵢ with the weights scaled to sum 1, in each tensor's dtype in the first model.

    Raises: ConfigError if weights and models do not match, or the models predict different things or have different
    schedules and `config` does not settle it; otherwise as `mend_model` does.
    """
    if len(paths) < 2 or len(weights) != len(paths):
        raise ConfigError(f"a merge needs two models or more and a weight each, found {len(paths)} and {len(weights)}.")
    total = sum(weights)
    if not all(map(math.isfinite, [*weights, total])):
        raise ConfigError(f"weights and their sum must be finite numbers, found {list(weights)}.")
    if not total > 0:
        raise ConfigError(f"weights must sum to more than 0, found {list(weights)}.")
    shares = [weight / total for weight in weights]
    if not all(map(_fits_float32, shares)):
        raise ConfigError(f"weights {list(weights)} nearly cancel: scaled to sum 1 they overflow.")
    config = config or MendConfig()
    sources = _open(paths, out, config, overwrite)
    _check_latents(sources)
    _check_kinds(sources)
    combined = _combined(sources, partial(_weighted, shares), shares, config)
    warnings = _mixture_words([source.findings for source in sources], config)
    return Merged(write_copy(combined, out, config), tuple(warnings))


def add_difference(
    base: Path,
    add: Path,
    minus: Path,
    out: Path,
    config: MendConfig | None = None,
    *,
    scale: float = 1.0,
    overwrite: bool = False,
) -> Merged:
    """base + scale·(add − minus): what fine-tuning `minus` into `add` taught, brought onto `base`, whose kind it keeps.

    Raises: ConfigError if they scale latents differently or `scale` is no finite number, otherwise as `mend_model`
    does. `config` settles what `base` is; the other two are only warned about.
    """
    if not _fits_float32(scale):
        raise ConfigError(f"the scale of a difference must be a finite number that float32 holds, found {scale}.")
    config = config or MendConfig()
    told = open_source(base, config, as_file=out.suffix == ".safetensors")
    others = MendConfig("v" if told.prediction_type == "v_prediction" else "epsilon", told.zero_terminal_snr)
    sources = [told, *(open_source(path, others) for path in (add, minus))]
    _check_latents(sources)
    for path in (base, add, minus):
        check_place(path, out, overwrite)
    kind = told.prediction_type
    warnings = []
    foreign = [str(s.findings.path) for s in sources[1:] if s.findings.prediction_type != kind]
    if len(foreign) == 2:
        warnings.append(
            f"the difference is between models read as {sources[1].findings.prediction_type}, and the base predicts "
            f"{kind}: styles and subjects carry over in part, brightness and the noisiest steps do not. Look at "
            "pictures before you trust it."
        )
    elif foreign:
        warnings.append(
            f"{foreign[0]} is not read as {kind}, as the other one is: the difference holds the change of the target "
            "itself and will spoil the base. Both sides of a difference must predict the same."
        )
    combined = _combined(sources, partial(_added, scale), [1.0, scale, -scale], config)
    return Merged(write_copy(combined, out, config), tuple(warnings))


def _open(paths: Sequence[Path], out: Path, config: MendConfig, overwrite: bool) -> list[Source]:
    for path in paths:
        check_place(path, out, overwrite)
    return [open_source(path, config, as_file=out.suffix == ".safetensors") for path in paths]


def _fits_float32(factor: float) -> bool:
    """Whether a factor is finite where it is applied."""
    return abs(factor) <= torch.finfo(torch.float32).max


def _weighted(shares: list[float], tensors: list[Tensor]) -> Tensor:
    return torch.stack([share * tensor.float() for share, tensor in zip(shares, tensors, strict=True)]).sum(0)


def _added(scale: float, tensors: list[Tensor]) -> Tensor:
    base, add, minus = (tensor.float() for tensor in tensors)
    return base + scale * (add - minus)


def _combined(sources: list[Source], combine: Combine, shares: list[float], config: MendConfig) -> Source:
    """The first source, its U-Net and text encoders replaced by the combination, its metadata by the merge's."""
    first = sources[0]
    networks = []
    for network in first.networks:
        if network.name == "vae":
            networks.append(network)
            continue
        matching = [_matching(source, network, first) for source in sources]
        networks.append(replace(network, read=partial(_read, matching, combine, config.dtype)))
    parents = [(source.findings, share) for source, share in zip(sources, shares, strict=True)]
    metadata = merged_metadata(parents)
    if config.vae is not None:
        metadata = with_other_vae(metadata, config.vae)
    return replace(first, networks=networks, metadata=metadata)


def _check_kinds(sources: list[Source]) -> None:
    """Raises: ConfigError unless what was settled of the models, by their own words or by options, is the same."""
    kinds = sorted({source.prediction_type for source in sources})
    if len(kinds) > 1:
        raise ConfigError(
            f"the models do not predict the same thing: a weighted mean of {' and '.join(kinds)} predicts neither. Use "
            "--add and --minus, or say with --prediction what to mark the result as."
        )
    if len({source.zero_terminal_snr for source in sources}) > 1:
        raise ConfigError(
            "the models were trained on different schedules, with zero terminal SNR and without: their weighted mean "
            "fits neither. Use --add and --minus, or say with --zero-terminal-snr or --no-zero-terminal-snr what to "
            "mark the result as."
        )
    first = sources[0].findings
    for source in sources[1:]:
        if ScheduleConfig(**betas_of(source.findings)) != ScheduleConfig(**betas_of(first)):
            raise ConfigError(
                f"{first.path} and {source.findings.path} were trained on different betas: their weighted mean fits "
                "neither. Use --add and --minus."
            )


def _mixture_words(parents: list[Findings], config: MendConfig) -> list[str]:
    """What to be wary of where options settled what the models themselves say differently."""
    kinds = {_stated(findings, MendConfig(zero_terminal_snr=False))[0] for findings in parents} - {None}
    if len(kinds) > 1:
        return [
            "models of different prediction types were averaged: the result answers with a mixture of epsilon and v, "
            "and is likely to draw noise or mush."
        ]
    schedules = {_stated(findings, MendConfig(config.prediction))[1] for findings in parents} - {None}
    if len(schedules) > 1:
        return [
            "models of different schedules were averaged, trained to pure noise and not: the result answers with a "
            "mixture, worst at the noisiest steps."
        ]
    return []


def _stated(findings: Findings, config: MendConfig) -> tuple[PredictionType | None, bool | None]:
    """What a model says of itself beside what `config` settles; nothing if that leaves it undecided."""
    try:
        return decide(findings, config)
    except ConfigError:
        return None, None


def _check_latents(sources: list[Source]) -> None:
    """Raises: ConfigError where U-Nets were trained on latents of another scale, as far as their VAEs say so."""
    scales = {}
    for source in sources:
        for network in source.networks:
            if network.name == "vae":
                scales[latent_scale(network.config)] = source.findings.path
    if len(scales) > 1:
        one, other = list(scales.values())[:2]
        raise ConfigError(f"{one} and {other} scale latents differently: what combines their U-Nets knows neither.")


def _matching(source: Source, network: Network, first: Source) -> Network:
    for other in source.networks:
        if other.name == network.name and dict(other.shapes) == dict(network.shapes):
            _check_settings(network, other, first.findings.path, source.findings.path)
            return other
    raise ModelError(
        f"{source.findings.path} has no {network.name} of the same shape as {first.findings.path}: they cannot be "
        "merged."
    )


def _check_settings(network: Network, other: Network, first: Path, second: Path) -> None:
    """Raises: ModelError if two networks of one shape draw otherwise with the same weights."""
    if network.config == other.config:
        return
    mine, theirs = _drawing_settings(network), _drawing_settings(other)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            one, two = mine.get(key, "SDXL's own"), theirs.get(key, "SDXL's own")
            raise ModelError(
                f"{network.name} has another {key} in {first} ({one}) than in {second} ({two}): weights trained with "
                "the one mean something else with the other, so that they cannot be merged."
            )


def _drawing_settings(network: Network) -> Config:
    """The settings without which other pictures are drawn, where shapes alone would have them wrong."""
    name = network.name
    return drawing_settings(unseen_settings(name, network_config(name, build_network(name, network.config, "meta"))))


def _read(networks: list[Network], combine: Combine, asked: ExportDtype | None, rule: KeyRule) -> dict[str, Tensor]:
    """The rule's native tensors, combined in float32, rounded once: to the dtype asked for, or the first one's."""
    dtype = TORCH_DTYPES[asked] if asked else networks[0].dtype(rule)
    read = [network.read(rule) for network in networks]
    merged = {}
    for name in rule.native:
        exact = combine([tensors[name] for tensors in read])
        # Before the cast: to float8, torch's saturates. The mean of two greatest numbers may be rounded above them.
        if not bool((exact.abs() <= _most(dtype)).all()):
            raise ExportError(f"{name} reaches {float(exact.abs().max()):.3g} when merged, which overflows {dtype}.")
        merged[name] = exact.to(dtype)
    return merged


def _most(dtype: torch.dtype) -> float:
    """What in float32 is surely rounded to a finite number of the dtype, as less than half a step is."""
    info = torch.finfo(dtype)
    return min(info.max * (1 + info.eps / 4), torch.finfo(torch.float32).max)
