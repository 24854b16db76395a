"""What a model file or folder is, found in its header: kind, prediction type and the evidence, components, damage.

Owns the findings and the order in which evidence is believed; what other programs would make of it is `programs`'.
Nothing here imports torch, so that a file of 7 GB is described in well under a second. Weights are read, by numpy and
in pieces, only by `check_weights`.
"""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sumizome.errors import ModelError
from sumizome.models.architecture import Config, clip_config, unet_config, vae_config
from sumizome.models.expected import expected_original, expected_shapes
from sumizome.models.key_map import NETWORK_PREFIXES
from sumizome.models.single_file import infer_configs, prediction_of
from sumizome.models.tensor_header import TensorEntry, TensorHeader, read_header
from sumizome.programs import FolderScheduler, Layout, ModelFacts, Seen, Verdict, verdicts

__all__ = [
    "MARKS",
    "Component",
    "Evidence",
    "Findings",
    "Shapes",
    "file_configs",
    "folder_files",
    "inspect_model",
    "native_name",
    "sidecar_of",
]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Evidence:
    """One place that says, or could say, what the U-Net predicts."""

    source: str
    found: str
    prediction_type: Seen | None
    """What it speaks for; None where it says nothing about the prediction."""
    zero_terminal_snr: bool | None
    verdict: str
    """decides, agrees, contradicts, or silent."""


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
MARKS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max")
"""Empty or tiny tensors that tell programs what kind of model a file is."""
_HARMLESS = re.compile(
    r"v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_max|alphas_cumprod\w*|betas|log_one_minus_\w+|posterior_\w+|sqrt_\w+|model_ema\..*|denoiser\.sigmas"
    r"|(.*\.)?(position_ids|logit_scale|attn_mask)|conditioner\.embedders\.0\..*text_projection(\.weight)?"
)
"""Tensors beside the networks that programs write and none of them needs, and the marks."""
_TERMINAL_ALPHA = 1e-6
"""An ᾱ below this counts as pure noise: other programs write 4.9e-8 or 6e-8, SDXL's own schedule ends at 0.0047."""


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
    table = _last_alpha(header)
    evidence, seen, zero_snr, doubts = _file_evidence(header, path, sidecar_says, table)
    facts = ModelFacts(
        layout=layout,
        prediction_type=seen,
        zero_terminal_snr=zero_snr,
        has_v_pred="v_pred" in shapes,
        has_ztsnr="ztsnr" in shapes,
        has_edm=any(name.startswith("edm_") for name in shapes),
        stated=header.metadata.get("modelspec.prediction_type") or header.metadata.get("prediction_type") or "",
        has_model_spec="modelspec.architecture" in header.metadata,
        sidecar=sidecar_says,
        table_reaches_zero_snr=table is not None and table < _TERMINAL_ALPHA,
        name_says_v=_name_says_v(path),
    )
    return Findings(
        path=path,
        kind=kind,
        layout=layout,
        bytes=header.file_bytes,
        parameters=sum(entry.elements for entry in header.tensors.values()),
        dtypes=_dtypes(header.tensors.values()),
        prediction_type=seen,
        zero_terminal_snr=zero_snr,
        evidence=evidence,
        components=tuple(components),
        ignored=tuple(name for name in rest if _HARMLESS.fullmatch(name)),
        metadata=header.metadata,
        sidecar=sidecar,
        problems=tuple(filter(None, [*problems, *doubts])),
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
            component = _component(
                name, own, expected_original(name, file_configs(name, {key: entry.shape for key, entry in own.items()}))
            )
            components.append(component)
            problems += _component_problems(component)
        elif not prefix:
            problems.append(f"has no {name} (no {start}* tensors).")
    return components, problems


_FULL_SIZE = {
    "unet": unet_config(),
    "vae": vae_config(),
    "text_encoder": clip_config(),
    "text_encoder_2": clip_config(width=1280, layers=32, intermediate=5120, activation="gelu", projection_dim=1280),
}


def file_configs(name: str, shapes: Shapes) -> Config:
    """One network's configuration: as its shapes in the original layout show it, or SDXL's where they show none."""
    try:
        config = infer_configs(shapes)[name]
        if name == "unet":
            channels = shapes.get("model.diffusion_model.input_blocks.0.0.weight", (320, 4))[1]
            config = config | {"in_channels": channels if channels in (4, 9) else 4}
        expected_original(name, config)
    except (ModelError, KeyError, StopIteration, TypeError, ValueError, IndexError):
        return _FULL_SIZE[name]
    return config


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


def _component_problems(component: Component) -> list[str]:
    return [
        _names_problem(f"{component.name} lacks", component.missing),
        _names_problem(f"{component.name} has tensors that SDXL does not:", component.foreign),
        _names_problem(f"{component.name} has other shapes than SDXL:", component.misshapen),
    ]


def _names_problem(what: str, names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - 2:,} more" if len(names) > 2 else ""
    return f"{what} {', '.join(names[:2])}{more}." if names else ""


def _dtypes(entries: Any) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for entry in entries:
        if entry.elements:
            counted[entry.dtype] += entry.elements
    return dict(counted.most_common())


# --- the evidence ----------------------------------------------------------------------------------------------------

_NAME_OF_V = re.compile(r"v[-_]?pred", re.IGNORECASE)
_STATED: dict[str, tuple[Seen, bool | None]] = {
    "v": ("v_prediction", None),
    "v_prediction": ("v_prediction", None),
    "v-zsnr": ("v_prediction", True),
    "epsilon": ("epsilon", False),
    "eps": ("epsilon", False),
}


def _name_says_v(path: Path) -> bool:
    return bool(_NAME_OF_V.search(path.name))


def _file_evidence(
    header: TensorHeader, path: Path, sidecar: Seen | None, last_alpha: float | None
) -> tuple[tuple[Evidence, ...], Seen, bool, list[str]]:
    """(evidence in the order of belief, prediction type, terminal SNR, doubts). The verdict is `prediction_of`'s."""
    names, metadata = header.tensors, header.metadata
    seen: Seen
    try:
        seen, zero_snr = prediction_of(names, metadata)
    except ModelError:
        seen, zero_snr = "EDM", False
    says: list[tuple[str, str, Seen | None, bool | None]] = []
    for mark in MARKS:
        if mark.startswith("edm"):
            if mark in names:
                says.append((f"tensor {mark}", "present", "EDM", False))
        elif mark == "v_pred":
            says.append(("tensor v_pred", *(("present", "v_prediction", None) if mark in names else _ABSENT)))
        else:
            effective = ("present", None, True) if "v_pred" in names else ("means nothing without v_pred", None, None)
            says.append(("tensor ztsnr", *(effective if mark in names else _ABSENT)))
    for key in ("modelspec.prediction_type", "prediction_type"):
        stated = metadata.get(key)
        meaning = _STATED.get(stated or "", (None, None))
        says.append((f"metadata {key}", *((f'"{_short(stated)}"', *meaning) if stated else _ABSENT)))
    if "modelspec.predict_key" in metadata:
        stated = metadata["modelspec.predict_key"]
        says.append(("metadata modelspec.predict_key", f'"{_short(stated)}"', *_STATED.get(stated, (None, None))))
    if "ss_zero_terminal_snr" in metadata:
        told = metadata["ss_zero_terminal_snr"] == "True"
        says.append(("metadata ss_zero_terminal_snr", str(told), None, told))
    if last_alpha is not None:
        reaches = last_alpha < _TERMINAL_ALPHA
        says.append(("tensor alphas_cumprod", f"ends at {last_alpha:.3g}", None, reaches))
    says.append((f"{path.stem}.yaml", *((f"says {sidecar}", sidecar, None) if sidecar else _ABSENT)))
    if _name_says_v(path):
        says.append(("the file's name", "says v-pred", "v_prediction", None))
    return *_judged(says, seen, zero_snr), _doubts(says, seen, zero_snr, "the file")


_ABSENT: tuple[str, None, None] = ("absent", None, None)


def _judged(
    says: list[tuple[str, str, Seen | None, bool | None]], seen: Seen, zero_snr: bool
) -> tuple[tuple[Evidence, ...], Seen, bool]:
    evidence = []
    decided = {"prediction": False, "schedule": False}
    for source, found, prediction, zero in says:
        if prediction is None and zero is None:
            verdict = "silent"
        elif prediction not in (None, seen) or zero not in (None, zero_snr):
            verdict = "contradicts"
        elif (prediction and not decided["prediction"]) or (zero is not None and not decided["schedule"]):
            verdict = "decides"
        else:
            verdict = "agrees"
        decided["prediction"] |= prediction is not None
        decided["schedule"] |= zero is not None
        evidence.append(Evidence(source, found, prediction, zero, verdict))
    if not decided["prediction"]:
        evidence.append(Evidence("nothing above says otherwise", "SDXL's own", seen, zero_snr, "decides"))
    return tuple(evidence), seen, zero_snr


def _doubts(says: list[tuple[str, str, Seen | None, bool | None]], seen: Seen, zero_snr: bool, what: str) -> list[str]:
    doubts = []
    if seen == "EDM":
        doubts.append(
            "is marked as an EDM model, whose noise levels are not SDXL's; if it is none, `sumizome mend` with "
            "--prediction removes the marks."
        )
    against = [source for source, _, prediction, zero in says if prediction not in (None, seen)]
    if against and seen != "EDM":
        doubts.append(
            f"{_listed(against)} contradict{'s' if len(against) == 1 else ''} what {what} is read as ({seen}): if you "
            "know better, `sumizome mend` with --prediction v or --prediction epsilon settles it."
        )
    against = [source for source, _, _, zero in says if zero not in (None, zero_snr) and source != "tensor ztsnr"]
    if against and seen == "v_prediction":
        doubts.append(
            f"{_listed(against)} contradict{'s' if len(against) == 1 else ''} the schedule "
            f"({'with' if zero_snr else 'without'} zero terminal SNR): `sumizome mend` with --zero-terminal-snr or "
            "--no-zero-terminal-snr settles it."
        )
    return doubts


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _short(text: str | None) -> str:
    plain = "".join(character if character.isprintable() else " " for character in text or "")
    return plain if len(plain) <= 40 else plain[:39] + "…"


def _last_alpha(header: TensorHeader) -> float | None:
    """The last entry of the file's noise table: four bytes of data, which one program goes by."""
    entry = header.tensors.get("alphas_cumprod")
    if entry is None or entry.dtype != "F32" or not entry.elements:
        return None
    with header.path.open("rb") as file:
        file.seek(header.data_start + entry.stop - 4)
        return float(struct.unpack("<f", file.read(4))[0])


_MOST_SIDECAR_BYTES = 1_000_000


def sidecar_of(path: Path) -> tuple[Path | None, Seen | None]:
    """The .yaml beside a file, if there is one, and what it says of the prediction.

    It is looked through for the two words that A1111 and Forge go by, not parsed.
    """
    sidecar = path.with_suffix(".yaml")
    if not sidecar.is_file() or sidecar.stat().st_size > _MOST_SIDECAR_BYTES:
        return None, None
    text = re.sub(r"#.*", "", sidecar.read_text(encoding="utf-8", errors="replace"))
    if re.search(r"\.VScaling\b", text) or re.search(r"parameterization:\s*[\"']?v\b", text):
        return sidecar, "v_prediction"
    return sidecar, "epsilon" if "target:" in text else None


# --- a folder --------------------------------------------------------------------------------------------------------

_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _inspect_folder(path: Path) -> Findings:
    if (path / "checkpoints").is_dir() and not (path / "model_index.json").exists():
        raise ModelError(f"{path} looks like a training run of Sumizome: `sumizome export` makes a model of it first.")
    index = _json(path / "model_index.json")
    kind = str(index.get("_class_name"))
    if not kind.startswith("StableDiffusionXL"):
        raise ModelError(f"{path} holds a {_short(kind)}, expected a StableDiffusionXLPipeline.")
    components, headers, problems = [], [], []
    for name in NETWORK_PREFIXES:
        if not (path / name).is_dir():
            problems.append(f"has no {name} folder.")
            continue
        found = [read_header(file) for file in folder_files(path / name, name)]
        headers += found
        own = {native_name(name, key): entry for header in found for key, entry in header.tensors.items()}
        own = {key: entry for key, entry in own.items() if not _HARMLESS.fullmatch(key)}
        try:
            expected: Shapes = expected_shapes(name, _json(path / name / "config.json"))
        except ModelError as error:
            problems.append(f"names were not checked: {error}")
            expected = {key: entry.shape for key, entry in own.items()}
        components.append(_component(name, own, expected))
        problems += _component_problems(components[-1])
    scheduler, evidence, seen, zero_snr, doubts = _folder_evidence(path)
    facts = ModelFacts("folder", seen, zero_snr, scheduler=scheduler)
    entries = [entry for header in headers for entry in header.tensors.values()]
    return Findings(
        path=path,
        kind=f"SDXL{'' if kind == 'StableDiffusionXLPipeline' else f' ({kind})'}, diffusers folder",
        layout="folder",
        bytes=sum(header.file_bytes for header in headers),
        parameters=sum(entry.elements for entry in entries),
        dtypes=_dtypes(entries),
        prediction_type=seen,
        zero_terminal_snr=zero_snr,
        evidence=evidence,
        components=tuple(components),
        ignored=(),
        metadata={},
        sidecar=None,
        problems=tuple(filter(None, [*problems, *doubts])),
        programs=tuple(verdicts(facts)),
        headers=tuple(headers),
    )


def native_name(name: str, key: str) -> str:
    """The name of a folder's tensor in today's diffusers, and without transformers' "text_model."."""
    if name == "vae":
        for old, new in _OLD_VAE_NAMES.items():
            key = key.replace(old, new)
    return key.removeprefix("text_model.")


def folder_files(folder: Path, name: str) -> list[Path]:
    """The files of a network in its folder: the full-precision one, else its shards, else a variant such as fp16.

    Raises: ModelError if there is none.
    """
    stem = _STEMS.get(name, "model")
    whole = folder / f"{stem}.safetensors"
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    variants = sorted(folder.glob(f"{stem}.*.safetensors"))
    files = [whole] if whole.is_file() else shards or variants[:1]
    if not files:
        raise ModelError(
            f"{folder} has no {stem}.safetensors nor shards of it (pickled .bin files are never read). "
            "Copy or download the folder again."
        )
    return files


def _folder_evidence(path: Path) -> tuple[FolderScheduler, tuple[Evidence, ...], Seen, bool, list[str]]:
    config = _json(path / "scheduler" / "scheduler_config.json")
    stated = str(config.get("prediction_type", "epsilon"))
    rescales = bool(config.get("rescale_betas_zero_snr", False))
    last_sigma = _last_sigma(config.get("trained_betas"))
    spacing = str(config.get("timestep_spacing", "linspace"))
    scheduler = FolderScheduler(stated, rescales, last_sigma is not None and last_sigma > 1000, spacing)
    if stated not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{path}: scheduler_config.json says prediction_type {_short(stated)!r}, not known here.")
    seen: Seen = stated  # type: ignore[assignment]
    zero_snr = rescales or scheduler.betas_reach_zero_snr
    file = "scheduler_config.json"
    says: list[tuple[str, str, Seen | None, bool | None]] = [
        (f"{file} prediction_type", f'"{stated}"' if "prediction_type" in config else "absent: epsilon", seen, None),
        (f"{file} rescale_betas_zero_snr", str(rescales).lower(), None, rescales or None),
        (f"{file} trained_betas", *_ABSENT)
        if last_sigma is None
        else (f"{file} trained_betas", f"end at sigma {last_sigma:.4g}", None, scheduler.betas_reach_zero_snr),
        (f"{file} timestep_spacing", spacing, None, None),
    ]
    if not zero_snr:
        says.append(("nothing above says otherwise", "SDXL's own schedule", None, False))
    doubts = []
    if zero_snr and spacing == "leading":
        doubts.append("timestep_spacing leading never visits the terminal step (28 steps start at t = 946).")
    evidence, _, _ = _judged(says, seen, zero_snr)
    return scheduler, evidence, seen, zero_snr, doubts


def _last_sigma(betas: Any) -> float | None:
    """Sigma at the end of a table of betas."""
    if not isinstance(betas, list) or not all(isinstance(beta, int | float) and 0 < beta <= 1 for beta in betas):
        return None
    alpha = math.prod(1 - beta for beta in betas)
    return math.sqrt((1 - alpha) / alpha) if alpha > 0 else math.inf


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: a diffusers model folder has one. Check the path.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}). Copy it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object. Copy it again.")
    return found
