"""What other programs make of an SDXL model, as a table of rules: what each opens, what it reads, what helps.

Owns facts about other programs, each seen in their source or by running them (ComfyUI 0.3.64, Forge 2025-06, A1111
1.10.1, SwarmUI 2026-08, diffusers 0.42, InvokeAI 2026-08, SD.Next 2026-07, stable-diffusion.cpp 2026-08). It opens no
files: `inspection` collects the facts about a model, and `verdicts` applies the table to them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["PROGRAMS", "FolderScheduler", "Layout", "ModelFacts", "Program", "Reading", "Verdict", "verdicts"]

Layout = Literal["file", "unet", "folder"]
"""A whole single file, a U-Net alone in one file, or a diffusers folder."""

Seen = Literal["epsilon", "v_prediction", "sample", "EDM"]


@dataclass(frozen=True)
class FolderScheduler:
    """What a folder's scheduler_config.json says, diffusers' defaults where it is silent."""

    prediction_type: str
    rescales_to_zero_snr: bool
    betas_reach_zero_snr: bool
    """Whether `trained_betas` end at pure noise, which serves schedulers that do not know the flag."""
    timestep_spacing: str


@dataclass(frozen=True)
class ModelFacts:
    """All that any program looks at, and what the model is."""

    layout: Layout
    prediction_type: Seen
    """What the model was trained to predict, as far as the file tells."""
    zero_terminal_snr: bool
    has_v_pred: bool = False
    has_ztsnr: bool = False
    has_edm: bool = False
    stated: str = ""
    """Metadata `modelspec.prediction_type`, else `prediction_type`."""
    has_model_spec: bool = False
    sidecar: Seen | None = None
    """What a .yaml of the same name says."""
    table_reaches_zero_snr: bool = False
    """Whether the file holds an `alphas_cumprod` that ends at pure noise."""
    name_says_v: bool = False
    scheduler: FolderScheduler | None = None
    sidecar_fits: bool = True
    """Whether A1111's .yaml describes such a U-Net: SDXL at its full size, not for inpainting."""


@dataclass(frozen=True)
class Reading:
    """What a program takes a model for."""

    prediction_type: Seen
    zero_terminal_snr: bool


Remedy = str | Callable[[ModelFacts], str]


@dataclass(frozen=True)
class Program:
    """One program: how it decides, and what the user can do where it decides wrongly."""

    name: str
    opens: tuple[Layout, ...]
    reads: Callable[[ModelFacts], Reading]
    if_prediction_is_wrong: Remedy
    if_schedule_is_wrong: str
    schedule_is_a_setting: bool = False
    """Whether the schedule remains to be set by hand when the prediction has been mended."""
    remark: Callable[[ModelFacts], str | None] = lambda facts: None
    """What is worth saying where nothing is wrong."""


@dataclass(frozen=True)
class Verdict:
    """A program's row in the table."""

    program: str
    prediction_type: Seen | None
    """None where the program does not open the layout."""
    zero_terminal_snr: bool | None
    right: bool
    action: str
    """Exactly what the user has to do; "none" where it just works."""


def verdicts(facts: ModelFacts) -> list[Verdict]:
    """The table's rows for one model, in the table's order."""
    return [_verdict(program, facts) for program in PROGRAMS]


def _verdict(program: Program, facts: ModelFacts) -> Verdict:
    if facts.layout not in program.opens:
        action = _NOT_A_FOLDER if facts.layout == "folder" else _NOT_A_UNET
        return Verdict(program.name, None, None, False, action)
    seen = program.reads(facts)
    if seen.prediction_type != facts.prediction_type:
        remedy = program.if_prediction_is_wrong
        action = remedy if isinstance(remedy, str) else remedy(facts)
        if facts.zero_terminal_snr and program.schedule_is_a_setting and facts.sidecar_fits:
            action += f"; then {program.if_schedule_is_wrong}"
        return Verdict(program.name, *_pair(seen), False, action)
    if seen.zero_terminal_snr != facts.zero_terminal_snr:
        action = "mend (takes out what says pure noise)" if seen.zero_terminal_snr else program.if_schedule_is_wrong
        return Verdict(program.name, *_pair(seen), False, action)
    return Verdict(program.name, *_pair(seen), True, program.remark(facts) or "none")


def _pair(seen: Reading) -> tuple[Seen, bool]:
    return seen.prediction_type, seen.zero_terminal_snr


# --- how each program decides ----------------------------------------------------------------------------------------


def _by_keys(facts: ModelFacts) -> Reading:
    """ComfyUI: the marks alone, never metadata; `ztsnr` does nothing without `v_pred`."""
    if facts.has_edm:
        return Reading("EDM", False)
    if facts.has_v_pred:
        return Reading("v_prediction", facts.has_ztsnr)
    return Reading("epsilon", False)


def _by_keys_and_sidecar(facts: ModelFacts) -> Reading:
    """Forge: a .yaml of the same name wins over `v_pred`; `ztsnr` counts whatever the prediction is."""
    if facts.has_edm:
        return Reading("EDM", False)
    return Reading(facts.sidecar or _by_keys(facts).prediction_type, facts.has_ztsnr)


def _by_sidecar(facts: ModelFacts) -> Reading:
    """A1111 1.10.1: v if a .yaml of the same name says VScaling; the terminal step is a setting of the user's."""
    return Reading(facts.sidecar or "epsilon", False)


def _by_metadata(facts: ModelFacts) -> Reading:
    """SwarmUI: metadata that says anything replaces what ComfyUI would detect; "v" then means without ZTSNR."""
    if not facts.stated:
        return _by_keys(facts)
    return Reading("v_prediction" if facts.stated.startswith("v") else "epsilon", "zsnr" in facts.stated)


def _by_folder(facts: ModelFacts) -> Reading:
    """diffusers and InvokeAI: a folder's scheduler config; for a single file, SDXL base's own: epsilon."""
    if facts.scheduler is None:
        return Reading("epsilon", False)
    stated = facts.scheduler.prediction_type
    known: Seen = stated if stated in ("epsilon", "v_prediction", "sample") else "epsilon"  # type: ignore[assignment]
    return Reading(known, facts.scheduler.rescales_to_zero_snr or facts.scheduler.betas_reach_zero_snr)


def _by_name_or_keys(facts: ModelFacts) -> Reading:
    """SD.Next: v if the name contains vpred, v-pred or v_pred, or else by the marks; a folder by its config."""
    if facts.scheduler is not None:
        return _by_folder(facts)
    seen = _by_keys(facts)
    return Reading("v_prediction" if facts.name_says_v else seen.prediction_type, facts.has_ztsnr)


def _by_keys_and_table(facts: ModelFacts) -> Reading:
    """stable-diffusion.cpp: `v_pred`; it ignores `ztsnr` and takes `alphas_cumprod` for its noise levels."""
    return Reading(_by_keys(facts).prediction_type, facts.table_reaches_zero_snr)


def _diffusers_remark(facts: ModelFacts) -> str | None:
    scheduler = facts.scheduler
    if scheduler is None:
        return None
    if facts.zero_terminal_snr and scheduler.timestep_spacing == "leading":
        return 'Scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing"): leading skips pure noise'
    if facts.zero_terminal_snr and not scheduler.betas_reach_zero_snr:
        return "none with Euler, DPM++ 2M, UniPC, DDIM; mend for Heun, LMS, KDPM2, DEIS, PNDM (trained_betas)"
    return None


def _swarm_remark(facts: ModelFacts) -> str | None:
    if facts.layout == "file" and not facts.has_model_spec:
        return 'none; without ModelSpec metadata it calls the file "SDXL 0.9": set the architecture, or mend'
    return None


def _forge_remedy(facts: ModelFacts) -> str:
    return _wrong_sidecar(facts) or "mend (adds v_pred, ztsnr)"


def _a1111_remedy(facts: ModelFacts) -> str:
    if not facts.sidecar_fits:
        return "nothing helps: the .yaml by which it knows v-prediction is for SDXL's own U-Net, at its full size"
    return _wrong_sidecar(facts) or "mend (writes NAME.yaml, which must stand beside the file)"


def _wrong_sidecar(facts: ModelFacts) -> str | None:
    if facts.sidecar in (None, facts.prediction_type):
        return None
    return f"remove the .yaml beside the file: it says {facts.sidecar}"


_NOT_A_UNET = "needs one file that holds the VAE and the text encoders too"
_NOT_A_FOLDER = "give it a single file: mend --out NAME.safetensors"


PROGRAMS: tuple[Program, ...] = (
    Program(
        name="ComfyUI",
        opens=("file", "unet"),
        reads=_by_keys,
        if_prediction_is_wrong="mend (adds v_pred, ztsnr), or node ModelSamplingDiscrete, v_prediction, zsnr ticked",
        if_schedule_is_wrong="mend (adds ztsnr), or node ModelSamplingDiscrete, v_prediction, zsnr ticked",
    ),
    Program(
        name="Forge",
        opens=("file",),
        reads=_by_keys_and_sidecar,
        if_prediction_is_wrong=_forge_remedy,
        if_schedule_is_wrong="mend (adds ztsnr)",
    ),
    Program(
        name="A1111 1.10.1",
        opens=("file",),
        reads=_by_sidecar,
        if_prediction_is_wrong=_a1111_remedy,
        if_schedule_is_wrong="Settings > Sampler parameters > Noise schedule for sampling = Zero Terminal SNR",
        schedule_is_a_setting=True,
    ),
    Program(
        name="SwarmUI",
        opens=("file", "unet"),
        reads=_by_metadata,
        if_prediction_is_wrong="mend (metadata), or edit the model: Prediction Type",
        if_schedule_is_wrong='mend, or edit the model: Prediction Type v-zsnr (plain "v" turns it off)',
        remark=_swarm_remark,
    ),
    Program(
        name="diffusers",
        opens=("file", "unet", "folder"),
        reads=_by_folder,
        if_prediction_is_wrong="from_single_file(FILE, config=FOLDER); mend --out FOLDER makes one",
        if_schedule_is_wrong="mend --out FOLDER (rescale_betas_zero_snr, trained_betas)",
        remark=_diffusers_remark,
    ),
    Program(
        name="InvokeAI",
        opens=("file", "folder"),
        reads=_by_folder,
        if_prediction_is_wrong="mend --out FOLDER and import the folder: single files are always epsilon",
        if_schedule_is_wrong="mend --out FOLDER and import the folder",
    ),
    Program(
        name="SD.Next",
        opens=("file", "folder"),
        reads=_by_name_or_keys,
        if_prediction_is_wrong="mend, and a name that says v-pred only if the model is",
        if_schedule_is_wrong="mend (adds ztsnr)",
    ),
    Program(
        name="sd.cpp",
        opens=("file",),
        reads=_by_keys_and_table,
        if_prediction_is_wrong="mend (adds v_pred)",
        if_schedule_is_wrong="mend (adds alphas_cumprod, its only way to pure noise)",
    ),
)
