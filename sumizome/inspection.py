"""What a model file or folder is, found in its header: kind, prediction type and the evidence, components, damage.

Owns the findings; networks are held against SDXL's by `components`, the evidence is `evidence`'s, and what other
programs would make of it `programs`'. Nothing here
imports torch, so that a file of 7 GB is described in well under a second. Weights are read, by numpy and in pieces,
only by `models.weight_scan`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from sumizome.components import Component, component_of, component_problems, dtypes_of, names_problem
from sumizome.errors import ModelError
from sumizome.evidence import Evidence, file_evidence, folder_evidence, last_alpha, name_says_v, reaches_pure_noise
from sumizome.files import readable_size
from sumizome.models.expected import expected_original, expected_shapes
from sumizome.models.file_kinds import other_kind
from sumizome.models.folder_files import read_index, read_json, weight_files, weights_path
from sumizome.models.infer_config import Shapes, file_config
from sumizome.models.key_map import NETWORK_PREFIXES, native_name
from sumizome.models.prediction_marks import sidecar_of
from sumizome.models.scheduler_config import StatedSchedule, read_scheduler_config
from sumizome.models.stored_names import HARMLESS, layout_names, short_clip_names, unet_prefix_left_out
from sumizome.models.tensor_header import TensorHeader, read_header
from sumizome.models.unseen_settings import drawing_words, stated_settings
from sumizome.programs import FolderScheduler, Layout, ModelFacts, Seen, Verdict, verdicts

__all__ = ["Findings", "inspect_model"]


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
    """Of each file, for `scan_weights`."""


def inspect_model(path: Path) -> Findings:
    """Findings about the safetensors file or diffusers folder at `path`, from headers and small text files alone.

    Raises: ModelError for a file that is missing, damaged, pickled, or a folder that holds no model.
    """
    return _inspect_folder(path) if path.is_dir() else _inspect_file(path)


# --- a file ----------------------------------------------------------------------------------------------------------


def _inspect_file(path: Path) -> Findings:
    header = read_header(path)
    shapes: Shapes = {name: entry.shape for name, entry in header.tensors.items()}
    kind, layout, prefix = _file_kind(shapes)
    if layout is None:
        return _not_sdxl(path, kind, header)
    components, problems = _file_components(header, prefix)
    owned = {own for name, own in layout_names(shapes, prefix).items() if name.startswith(_PREFIXES)}
    rest = [name for name in shapes if name not in owned]
    problems += [names_problem("tensors of unknown use", [name for name in rest if not HARMLESS.fullmatch(name)])]
    if short_clip_names(shapes):
        problems.append(
            'the names of text_encoder lack "text_model.", as transformers 5 has them: programs that look for the '
            "layout's own find no encoder; mend writes those."
        )
    problems += _unseen(header)
    if any(name.startswith("model_ema.") for name in rest):
        size = sum(header.tensors[name].stop - header.tensors[name].start for name in rest)
        problems.append(f"holds a second, averaged U-Net that no program reads ({readable_size(size)}): mend drops it.")

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
        sidecar_fits=not _variant(shapes),
    )
    return Findings(
        path=path,
        kind=kind,
        layout=layout,
        bytes=header.file_bytes,
        parameters=sum(entry.elements for entry in header.tensors.values()),
        dtypes=dtypes_of(header.tensors.values()),
        prediction_type=judgement.prediction_type,
        zero_terminal_snr=judgement.zero_terminal_snr,
        evidence=judgement.evidence,
        components=tuple(components),
        ignored=tuple(name for name in rest if HARMLESS.fullmatch(name)),
        metadata=header.metadata,
        sidecar=sidecar,
        problems=tuple(filter(None, [*problems, *judgement.doubts])),
        programs=tuple(verdicts(facts)),
        headers=(header,),
    )


def _file_kind(shapes: Shapes) -> tuple[str, Layout | None, str]:
    """(kind in words, layout, what to put before names to make them the original layout's)."""
    other = other_kind(shapes)
    if other is not None:
        return other, None, ""
    unet = NETWORK_PREFIXES["unet"]
    if any(name.startswith(unet) for name in shapes):
        whole = any(name.startswith("conditioner.") for name in shapes)
        words = "original single file" if whole else "U-Net without text encoders, original layout"
        return f"SDXL{_variant(shapes)}, {words}", "file" if whole else "unet", ""
    if unet_prefix_left_out(shapes):
        family = f"SDXL{_variant(shapes)}" if "label_emb.0.0.weight" in shapes else None
        return (f"{family}, U-Net alone, original layout", "unet", unet) if family else ("U-Net, not SDXL's", None, "")
    if any(re.match(r"(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv)", name) for name in shapes):
        return "VAE alone", None, ""
    return "no model that is known here", None, ""


def _unseen(header: TensorHeader) -> list[str]:
    """What metadata says of settings that shapes do not show, and that other programs draw otherwise without."""
    try:
        return [f"{words}." for words in drawing_words(stated_settings(header.metadata))]
    except ModelError as error:
        return [str(error)]


def _variant(shapes: Shapes) -> str:
    narrow = " at a small size" if _is_small(shapes) else ""
    return f"{narrow} for inpainting" if _first_convolution(shapes)[1:2] == (9,) else narrow


def _is_small(shapes: Shapes) -> bool:
    return 0 < _first_convolution(shapes)[0] < 320


def _first_convolution(shapes: Shapes) -> tuple[int, ...]:
    """(channels out, channels in, …) of the U-Net's first layer."""
    name = "input_blocks.0.0.weight"
    return shapes.get(NETWORK_PREFIXES["unet"] + name) or shapes.get(name) or (320, 4)


def _not_sdxl(path: Path, kind: str, header: TensorHeader) -> Findings:
    return Findings(
        path=path,
        kind=kind,
        layout=None,
        bytes=header.file_bytes,
        parameters=sum(entry.elements for entry in header.tensors.values()),
        dtypes=dtypes_of(header.tensors.values()),
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


_PREFIXES = tuple(NETWORK_PREFIXES.values())


def _file_components(header: TensorHeader, prefix: str) -> tuple[list[Component], list[str]]:
    components, problems = [], []
    tensors = {name: header.tensors[own] for name, own in layout_names(header.tensors, prefix).items()}
    for name, start in NETWORK_PREFIXES.items():
        own = {key: entry for key, entry in tensors.items() if key.startswith(start)}
        if own:
            config = file_config(name, {key: entry.shape for key, entry in own.items()})
            component = component_of(name, own, expected_original(name, config))
            components.append(component)
            problems += component_problems(component)
        elif not prefix:
            problems.append(f"has no {name} (no {start}* tensors).")
    return components, problems


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
        own = {key: entry for key, entry in own.items() if not HARMLESS.fullmatch(key)}
        try:
            expected: Shapes = expected_shapes(
                name, read_json(path / name / "config.json", f"SDXL's {name} belongs there")
            )
        except ModelError as error:
            problems.append(f"names were not checked: {error}")
            expected = {key: entry.shape for key, entry in own.items()}
        components.append(component_of(name, own, expected))
        problems += component_problems(components[-1])
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
        dtypes=dtypes_of(entries),
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
