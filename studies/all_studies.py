"""The studies, in the order in which they are run: later ones may sample from models of earlier ones."""

from studies.canvas import CANVAS
from studies.guidance import GUIDANCE
from studies.harness import Study
from studies.min_snr import MIN_SNR
from studies.tag_weights import TAG_WEIGHTS
from studies.uptraining import UPTRAINING

__all__ = ["STUDIES"]

STUDIES: tuple[Study, ...] = (MIN_SNR, UPTRAINING, GUIDANCE, CANVAS, TAG_WEIGHTS)
