"""What a model file or folder is, found in its header: kind, prediction type and the evidence, components, damage.

Owns the findings; the evidence is `evidence`'s, and what other programs would make of it `programs`'. Nothing here
imports torch, so that a file of 7 GB is described in well under a second. Weights are read, by numpy and in pieces,
only by `models.weight_scan`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sumizome.errors import ModelError
from sumizome.evidence import Evidence, file_evidence, folder_evidence, last_alpha, name_says_v, reaches_pure_noise
from sumizome.models.expected import expected_original, expected_shapes
from sumizome.models.folder_files import read_index, read_json, weight_files, weights_path
from sumizome.models.infer_config import Shapes, file_config
from sumizome.models.key_map import NETWORK_PREFIXES, native_name
from sumizome.models.prediction_marks import sidecar_of
from sumizome.models.scheduler_config import StatedSchedule, read_scheduler_config
from sumizome.models.tensor_header import TensorEntry, TensorHeader, read_header
from sumizome.programs import FolderScheduler, Layout, ModelFacts, Seen, Verdict, verdicts

__all__ = ["Component", "Findings", "inspect_model"]


@dataclass(frozen=True)
class Component:
    """One network as it stands in the file."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    """Parameters by dtype, the most first."""
    missing: tuple[str, ...]
    foreign: tuple[str, ...]
    misshapen: tuple[str, ...]
    """Tensors whose shape is not the architecture's, with both shapes."""


@dataclass(frozen=True)
class Findings:
    """All that was found."""

    path: Path
    kind: str
    """In words: "SDXL, original single file" and the like."""
    layout: Layout | None
    """None for what is no SDXL model."""
    bytes: int
    parameters: int
    dtypes: dict[str, int]
    prediction_type: Seen | None
    zero_terminal_snr: bool | None
    evidence: tuple[Evidence, ...]
    components: tuple[Component, ...]
    ignored: tuple[str, ...]
    """Tensors that belong to no component and do no harm."""
    metadata: dict[str, str]
    sidecar: Path | None
    problems: tuple[str, ...]
    """What is wrong or doubtful, a sentence each."""
    programs: tuple[Verdict, ...]
    headers: tuple[TensorHeader, ...]
    """Of each file, for `check_weights`."""


def inspect_model(path: Path) -> Findings:
    """Findings about the safetensors file or diffusers folder at `path`, from headers and small text files alone.

    Raises: ModelError for a file that is missing, damaged, pickled, or a folder that holds no model.
    """
    return _inspect_folder(path) if path.is_dir() else _inspect_file(path)


# --- a file ----------------------------------------------------------------------------------------------------------

_OTHER_KINDS: tuple[tuple[str, str], ...] = (
    (r"lora_(unet|te\d?)_|.*\.(lora_(A|B|up|down)|hada_w|lokr_w)", "LoRA, not a whole model"),
    (r"clip_[gl]$|emb_params$", "textual inversion (an embedding), not a model"),
    (r"control_model\.|controlnet_|input_hint_block\.", "ControlNet, not a model by itself"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3 model, not SDXL"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "Flux model, not SDXL"),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2 checkpoint, not SDXL"),
    (r"cond_stage_model\.", "Stable Diffusion 1 checkpoint, not SDXL"),
    (r"conditioner\.embedders\.0\.model\.", "SDXL refiner, not the base model"),
    (r"(text_model\.)?encoder\.layers\.", "text encoder alone"),
)
_HARMLESS = re.compile(
    r"v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_max|alphas_cumprod\w*|betas|log_one_minus_\w+|posterior_\w+|sqrt_\w+|model_ema\..*|denoiser\.sigmas"
    r"|(.*\.)?(position_ids|logit_scale|attn_mask)|conditioner\.embedders\.0\..*text_projection(\.weight)?"
)
"""Tensors beside the networks that programs write and none of them needs, and the marks."""


def _inspect_file(path: Path) -> Findings:
    header = read_header(path)
    shapes: Shapes = {name: entry.shape for name, entry in header.tensors.items()}
    kind, layout, prefix = _file_kind(shapes)
    if layout is None:
        return _not_sdxl(path, kind, header)
    components, problems = _file_components(header, prefix)
    owned = _owned_names(shapes, prefix)
    rest = [name for name in shapes if name not in owned]
    problems += [_names_problem("tensors of unknown use", [name for name in rest if not _HARMLESS.fullmatch(name)])]
    if any(name.startswith("model_ema.") for name in rest):
        size = sum(header.tensors[name].stop - header.tensors[name].start for name in rest)
        problems.append(f"holds a second, averaged U-Net that no program reads ({size / 1e9:.2f} GB): mend drops it.")

    sidecar, sidecar_says = sidecar_of(path)
    judgement = file_evidence(header, sidecar_says)
    facts = ModelFacts(
        layout=layout,
        prediction_type=judgement.prediction_type,
        zero_terminal_snr=judgement.zero_terminal_snr,
        has_v_pred="v_pred" in shapes,
        has_ztsnr="ztsnr" in shapes,
        has_edm=any(name.startswith("edm_") for name in shapes),
        stated=header.metadata.get("modelspec.prediction_type") or header.metadata.get("prediction_type") or "",
        has_model_spec="modelspec.architecture" in header.metadata,
        sidecar=sidecar_says,
        table_reaches_zero_snr=reaches_pure_noise(last_alpha(header)),
        name_says_v=name_says_v(path),
    )
    return Findings(
        path=path,
        kind=kind,
        layout=layout,
        bytes=header.file_bytes,
        parameters=sum(entry.elements for entry in header.tensors.values()),
        dtypes=_dtypes(header.tensors.values()),
        prediction_type=judgement.prediction_type,
        zero_terminal_snr=judgement.zero_terminal_snr,
        evidence=judgement.evidence,
        components=tuple(components),
        ignored=tuple(name for name in rest if _HARMLESS.fullmatch(name)),
        metadata=header.metadata,
        sidecar=sidecar,
        problems=tuple(filter(None, [*problems, *judgement.doubts])),
        programs=tuple(verdicts(facts)),
        headers=(header,),
    )


def _file_kind(shapes: Shapes) -> tuple[str, Layout | None, str]:
    """(kind in words, layout, what to put before names to make them the original layout's)."""
    for pattern, kind in _OTHER_KINDS:
        if any(re.match(pattern, name) for name in shapes):
            return kind, None, ""
    unet = NETWORK_PREFIXES["unet"]
    if any(name.startswith(unet) for name in shapes):
        whole = any(name.startswith("conditioner.") for name in shapes)
        words = "original single file" if whole else "U-Net without text encoders, original layout"
        return f"SDXL{_variant(shapes, unet)}, {words}", "file" if whole else "unet", ""
    if "input_blocks.0.0.weight" in shapes:
        family = f"SDXL{_variant(shapes, '')}" if "label_emb.0.0.weight" in shapes else None
        return (f"{family}, U-Net alone, original layout", "unet", unet) if family else ("U-Net, not SDXL's", None, "")
    if any(name.startswith("down_blocks.") for name in shapes):
        return "U-Net alone in diffusers' layout: one component of a diffusers folder", None, ""
    if any(re.match(r"(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv)", name) for name in shapes):
        return "VAE alone", None, ""
    return "no model that is known here", None, ""


def _variant(shapes: Shapes, prefix: str) -> str:
    shape = shapes.get(f"{prefix}input_blocks.0.0.weight", (0, 4))
    narrow = " at a small size" if 0 < shape[0] < 320 else ""
    return f"{narrow} for inpainting" if shape[1:2] == (9,) else narrow


def _not_sdxl(path: Path, kind: str, header: TensorHeader) -> Findings:
    return Findings(
        path=path,
        kind=kind,
        layout=None,
        bytes=header.file_bytes,
        parameters=sum(entry.elements for entry in header.tensors.values()),
        dtypes=_dtypes(header.tensors.values()),
        prediction_type=None,
        zero_terminal_snr=None,
        evidence=(),
        components=(),
        ignored=(),
        metadata=header.metadata,
        sidecar=None,
        problems=(),
        programs=(),
        headers=(header,),
    )


def _owned_names(shapes: Shapes, prefix: str) -> set[str]:
    starts = tuple(NETWORK_PREFIXES.values())
    return {name for name in shapes if (prefix + name).startswith(starts) and not _HARMLESS.fullmatch(name)}


def _file_components(header: TensorHeader, prefix: str) -> tuple[list[Component], list[str]]:
    components, problems = [], []
    tensors = {prefix + key: entry for key, entry in header.tensors.items() if not _HARMLESS.fullmatch(key)}
    for name, start in NETWORK_PREFIXES.items():
        own = {key: entry for key, entry in tensors.items() if key.startswith(start)}
        if own:
            config = file_config(name, {key: entry.shape for key, entry in own.items()})
            component = _component(name, own, expected_original(name, config))
            components.append(component)
            problems += _component_problems(component)
        elif not prefix:
            problems.append(f"has no {name} (no {start}* tensors).")
    return components, problems


def _component(name: str, own: Mapping[str, TensorEntry], expected: Shapes) -> Component:
    misshapen = [
        f"{key} {_shape(own[key].shape)}, expected {_shape(shape)}"
        for key, shape in expected.items()
        if key in own and _squeezed(own[key].shape) != _squeezed(shape)
    ]
    return Component(
        name=name,
        tensors=len(own),
        parameters=sum(entry.elements for entry in own.values()),
        bytes=sum(entry.stop - entry.start for entry in own.values()),
        dtypes=_dtypes(own.values()),
        missing=tuple(sorted(set(expected) - set(own))),
        foreign=tuple(sorted(set(own) - set(expected))),
        misshapen=tuple(misshapen),
    )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Old VAE files hold linear layers where others hold 1×1 convolutions."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def _component_problems(component: Component) -> list[str]:
    strange = {dtype: count for dtype, count in component.dtypes.items() if dtype not in _FLOATS}
    return [
        *(
            f"{component.name} has {count:,} weights of dtype {dtype}, where floating-point numbers belong: quantised "
            "in a way that is not known here, or damaged."
            for dtype, count in strange.items()
        ),
        _names_problem(f"{component.name} lacks", component.missing),
        _names_problem(f"{component.name} has tensors that SDXL does not:", component.foreign),
        _names_problem(f"{component.name} has other shapes than SDXL:", component.misshapen),
    ]


def _names_problem(what: str, names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 2:,} more" if len(names) > 2 else ""
    return f"{what} {', '.join(names[:2])}{more}." if names else ""


def _dtypes(entries: Iterable[TensorEntry]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for entry in entries:
        if entry.elements:
            counted[entry.dtype] += entry.elements
    return dict(counted.most_common())


# --- a folder --------------------------------------------------------------------------------------------------------


def _inspect_folder(path: Path) -> Findings:
    if (path / "checkpoints").is_dir() and not (path / "model_index.json").exists():
        raise ModelError(f"{path} looks like a training run of Sumizome: `sumizome export` makes a model of it first.")
    kind = str(read_index(path)["_class_name"])
    components, headers, problems = [], [], []
    for name in NETWORK_PREFIXES:
        if not (path / name).is_dir():
            problems.append(f"has no {name} folder.")
            continue
        found = [read_header(file) for file in weight_files(weights_path(path, name))]
        headers += found
        own = {native_name(key): entry for header in found for key, entry in header.tensors.items()}
        own = {key: entry for key, entry in own.items() if not _HARMLESS.fullmatch(key)}
        try:
            expected: Shapes = expected_shapes(
                name, read_json(path / name / "config.json", f"SDXL's {name} belongs there")
            )
        except ModelError as error:
            problems.append(f"names were not checked: {error}")
            expected = {key: entry.shape for key, entry in own.items()}
        components.append(_component(name, own, expected))
        problems += _component_problems(components[-1])
    stated = read_scheduler_config(path)
    judgement = folder_evidence(stated)
    facts = ModelFacts(
        "folder", judgement.prediction_type, judgement.zero_terminal_snr, scheduler=_folder_scheduler(stated)
    )
    entries = [entry for header in headers for entry in header.tensors.values()]
    return Findings(
        path=path,
        kind=f"SDXL{'' if kind == 'StableDiffusionXLPipeline' else f' ({kind})'}, diffusers folder",
        layout="folder",
        bytes=sum(header.file_bytes for header in headers),
        parameters=sum(entry.elements for entry in entries),
        dtypes=_dtypes(entries),
        prediction_type=judgement.prediction_type,
        zero_terminal_snr=judgement.zero_terminal_snr,
        evidence=judgement.evidence,
        components=tuple(components),
        ignored=(),
        metadata={},
        sidecar=None,
        problems=tuple(filter(None, [*problems, *judgement.doubts])),
        programs=tuple(verdicts(facts)),
        headers=tuple(headers),
    )


def _folder_scheduler(stated: StatedSchedule) -> FolderScheduler:
    return FolderScheduler(
        stated.prediction_type, stated.rescales, stated.betas_reach_zero_snr, stated.timestep_spacing
    )
