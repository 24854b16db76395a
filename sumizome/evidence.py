"""What a file or folder says of its prediction type and schedule, place by place, and how the places agree. No torch.

Owns the list of places and the words for each; which of them is believed is the rule of `models.prediction_marks` and
`models.scheduler_config`, whose answer this explains. The places come in the order of belief.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from sumizome.errors import ModelError
from sumizome.models.prediction_marks import MARKS, STATEMENTS, prediction_of
from sumizome.models.scheduler_config import StatedSchedule
from sumizome.models.tensor_header import TensorHeader
from sumizome.programs import Seen

__all__ = [
    "Evidence",
    "Judgement",
    "file_evidence",
    "folder_evidence",
    "last_alpha",
    "name_says_v",
    "reaches_pure_noise",
]


@dataclass(frozen=True)
class Evidence:
    """One place that says, or could say, what the U-Net predicts."""

    source: str
    found: str
    prediction_type: Seen | None
    """What it speaks for; None where it says nothing about the prediction."""
    zero_terminal_snr: bool | None
    verdict: Literal["decides", "agrees", "contradicts", "silent"]


@dataclass(frozen=True)
class Judgement:
    """What a model is read as, and why."""

    prediction_type: Seen
    zero_terminal_snr: bool
    evidence: tuple[Evidence, ...]
    doubts: tuple[str, ...]
    """Contradictions, a sentence each with its remedy."""


class _Says(NamedTuple):
    """A place, what is found there, and what that speaks for."""

    source: str
    found: str = "absent"
    prediction_type: Seen | None = None
    zero_terminal_snr: bool | None = None


# --- a file ----------------------------------------------------------------------------------------------------------

_TERMINAL_ALPHA = 1e-6
"""An ᾱ below this counts as pure noise: other programs write 4.9e-8 or 6e-8, SDXL's own schedule ends at 0.0047."""
_NAME_OF_V = re.compile(r"v[-_]?pred", re.IGNORECASE)
_STATED: dict[str, tuple[Seen, bool | None]] = {
    "v": ("v_prediction", None),
    "v_prediction": ("v_prediction", None),
    "v-zsnr": ("v_prediction", True),
    "epsilon": ("epsilon", False),
    "eps": ("epsilon", False),
}


def file_evidence(header: TensorHeader, sidecar: Literal["epsilon", "v_prediction", "sample"] | None) -> Judgement:
    """What the single file with this header says; `sidecar` is what the .yaml beside it says."""
    seen: Seen
    try:
        seen, zero_snr = prediction_of(header.tensors, header.metadata, sidecar)
    except ModelError:
        seen, zero_snr = "EDM", False
    says = [*_marks(header), *_metadata(header.metadata), *_beside(header, sidecar)]
    doubts = [*_doubts(says, seen, zero_snr)]
    if seen == "epsilon" and "ztsnr" in header.tensors:
        doubts.append(
            "holds ztsnr without v_pred: most likely a v-prediction model that lost its other mark; `sumizome mend` "
            "with --prediction v --zero-terminal-snr gives it back."
        )
    return Judgement(seen, zero_snr, _judged(says, seen, zero_snr), tuple(doubts))


def name_says_v(path: Path) -> bool:
    """Whether the file is named after v-prediction, as one program goes by."""
    return bool(_NAME_OF_V.search(path.name))


def last_alpha(header: TensorHeader) -> float | None:
    """The last entry of the file's noise table: four bytes of data, which one program goes by."""
    entry = header.tensors.get("alphas_cumprod")
    if entry is None or entry.dtype != "F32" or not entry.elements:
        return None
    with header.path.open("rb") as file:
        file.seek(header.data_start + entry.stop - 4)
        return float(struct.unpack("<f", file.read(4))[0])


def reaches_pure_noise(alpha: float | None) -> bool:
    """Whether a noise table that ends at ᾱ = `alpha` ends at pure noise."""
    return alpha is not None and alpha < _TERMINAL_ALPHA


def _marks(header: TensorHeader) -> Iterator[_Says]:
    names = header.tensors
    yield _Says("tensor v_pred", "present", "v_prediction") if "v_pred" in names else _Says("tensor v_pred")
    if "ztsnr" not in names:
        yield _Says("tensor ztsnr")
    elif "v_pred" in names:
        yield _Says("tensor ztsnr", "present", None, True)
    else:
        yield _Says("tensor ztsnr", "means nothing without v_pred")
    for mark in MARKS:
        if mark.startswith("edm") and mark in names:
            yield _Says(f"tensor {mark}", "present", "EDM", False)


def _metadata(metadata: Mapping[str, str]) -> Iterator[_Says]:
    for key in STATEMENTS:
        stated = metadata.get(key)
        if stated:
            yield _Says(f"metadata {key}", f'"{_short(stated)}"', *_STATED.get(stated, (None, None)))
        elif key != "modelspec.predict_key":
            yield _Says(f"metadata {key}")
    if "ss_zero_terminal_snr" in metadata:
        told = metadata["ss_zero_terminal_snr"] == "True"
        yield _Says("metadata ss_zero_terminal_snr", str(told), None, told)


def _beside(header: TensorHeader, sidecar: Seen | None) -> Iterator[_Says]:
    alpha = last_alpha(header)
    if alpha is not None:
        yield _Says("tensor alphas_cumprod", f"ends at {alpha:.3g}", None, reaches_pure_noise(alpha))
    place = f"{header.path.stem}.yaml"
    yield _Says(place, f"says {sidecar}", sidecar) if sidecar else _Says(place)
    if name_says_v(header.path):
        yield _Says("the file's name", "says v-pred", "v_prediction")


# --- a folder --------------------------------------------------------------------------------------------------------


def folder_evidence(stated: StatedSchedule) -> Judgement:
    """What a folder's scheduler_config.json says."""
    seen, zero_snr = stated.prediction_type, stated.zero_terminal_snr
    file = "scheduler_config.json"
    said = f'"{seen}"' if stated.says_prediction else "absent: epsilon"
    says = [
        _Says(f"{file} prediction_type", said, seen),
        _Says(f"{file} rescale_betas_zero_snr", str(stated.rescales).lower(), None, stated.rescales or None),
        _Says(f"{file} trained_betas"),
        _Says(f"{file} timestep_spacing", _short(stated.timestep_spacing)),
    ]
    if stated.last_sigma is not None:
        # With the flag, betas of any end are rescaled: they say nothing against it.
        speaks = True if stated.betas_reach_zero_snr else None if stated.rescales else False
        says[2] = _Says(f"{file} trained_betas", f"end at sigma {stated.last_sigma:.4g}", None, speaks)
    if not zero_snr:
        says.append(_Says("nothing above says otherwise", "SDXL's own schedule", None, False))
    doubts = []
    if zero_snr and stated.timestep_spacing == "leading":
        doubts.append("timestep_spacing leading never visits the terminal step (28 steps start at t = 946).")
    return Judgement(seen, zero_snr, _judged(says, seen, zero_snr), tuple(doubts))


# --- how the places agree --------------------------------------------------------------------------------------------


def _judged(says: list[_Says], seen: Seen, zero_snr: bool) -> tuple[Evidence, ...]:
    evidence = []
    prediction_decided = schedule_decided = False
    for place in says:
        prediction, zero = place.prediction_type, place.zero_terminal_snr
        verdict: Literal["decides", "agrees", "contradicts", "silent"]
        if prediction is None and zero is None:
            verdict = "silent"
        elif prediction not in (None, seen) or zero not in (None, zero_snr):
            verdict = "contradicts"
        elif (prediction and not prediction_decided) or (zero is not None and not schedule_decided):
            verdict = "decides"
        else:
            verdict = "agrees"
        prediction_decided |= prediction is not None
        schedule_decided |= zero is not None
        evidence.append(Evidence(*place, verdict))
    if not prediction_decided:
        evidence.append(Evidence("nothing above says otherwise", "SDXL's own", seen, zero_snr, "decides"))
    return tuple(evidence)


def _doubts(says: list[_Says], seen: Seen, zero_snr: bool) -> Iterator[str]:
    for place in says:
        statement = place.source.removeprefix("metadata ") in STATEMENTS and place.found != "absent"
        if statement and place.prediction_type is None:
            yield (
                f"{place.source} says {place.found}, which is no word that programs know: `sumizome mend` with "
                "--prediction v or --prediction epsilon settles it."
            )
    if seen == "EDM":
        yield (
            "is marked as an EDM model, whose noise levels are not SDXL's; if it is none, `sumizome mend` with "
            "--prediction removes the marks."
        )
    against = [place.source for place in says if place.prediction_type not in (None, seen)]
    if against and seen != "EDM":
        yield (
            f"{_contradict(against)} what the file is read as ({seen}): if you know better, `sumizome mend` with "
            "--prediction v or --prediction epsilon settles it."
        )
    against = [_quoted(place) for place in says if place.zero_terminal_snr not in (None, zero_snr)]
    if against and seen == "v_prediction":
        half_marked = not zero_snr and any(place.source == "tensor v_pred" and place.prediction_type for place in says)
        mark = ", since v_pred stands without ztsnr" if half_marked else ""
        yield (
            f"{_contradict(against)} the schedule that it is read with ({'with' if zero_snr else 'without'} zero "
            f"terminal SNR{mark}): `sumizome mend` with --zero-terminal-snr or --no-zero-terminal-snr settles it."
        )


def _quoted(place: _Says) -> str:
    return f"{place.source} ({place.found})"


def _contradict(sources: list[str]) -> str:
    if len(sources) == 1:
        return f"{sources[0]} contradicts"
    return f"{', '.join(sources[:-1])} and {sources[-1]} contradict"


def _short(text: str) -> str:
    plain = "".join(character if character.isprintable() else " " for character in text)
    return plain if len(plain) <= 40 else plain[:39] + "…"
