"""Running a study: every arm with every seed, a file written the moment a run is measured, then a page.

Owns the files and their order. A result that stands in `work/studies/results` with the settings that the study has now
is not made again, so that a study that was stopped goes on where it was. The pages are written from
`docs/studies/NAME.json`, which holds all results of a study and nothing else.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from studies.datasets import ROOT, WORK, DataSet, base_model, latents
from studies.page import PageParts
from sumizome.files import write_atomically

__all__ = ["PAGES", "SEEDS", "Measures", "Results", "Study", "collect", "read_results", "run_studies"]

SEEDS = (0, 1, 2)
PAGES = ROOT / "docs" / "studies"

Measures = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A question, its arms, and how one of them is run."""

    name: str
    title: str
    question: str
    arms: Mapping[str, str]
    """name → what it is, in a few words."""
    settings: Mapping[str, Any]
    """What a result depends on beside its arm and seed; a result of other settings is made again."""
    data: Sequence[DataSet]
    measure: Callable[[str, int], Measures]
    """(arm, seed) → numbers, as JSON holds them."""
    page: Callable[["Results"], PageParts]
    """What the page says of all results."""


@dataclass(frozen=True)
class Results:
    """What `docs/studies/NAME.json` holds."""

    settings: Mapping[str, Any]
    of: Mapping[str, Mapping[int, Measures]]
    """arm → seed → measures."""
    cpu_minutes: float

    def seeds(self, arm: str, number: Callable[[Measures], float]) -> list[float]:
        """One number of each seed, in the seeds' order."""
        return [number(measures) for _, measures in sorted(self.of[arm].items())]


def run_studies(studies: Sequence[Study], processes: int) -> Iterator[Study]:
    """Runs what is missing, study by study; yields each when all of its results are there."""
    for study in studies:
        missing = [(arm, seed) for arm in study.arms for seed in SEEDS if _result(study, arm, seed) is None]
        if missing:
            print(f"{study.name}: {len(missing)} of {len(SEEDS) * len(study.arms)} runs to make", flush=True)
            for seed in SEEDS:
                base_model(seed)
            for data in study.data:
                latents(data)
            _run(study, missing, min(processes, len(missing)))
        yield study


def _run(study: Study, missing: Sequence[tuple[str, int]], processes: int) -> None:
    if processes == 1:
        torch.set_num_threads(1)
        for arm, seed in missing:
            print(_measure(study.name, arm, seed), flush=True)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for done in as_completed([pool.submit(_measure, study.name, arm, seed) for arm, seed in missing]):
            print(done.result(), flush=True)


def _measure(name: str, arm: str, seed: int) -> str:
    """Makes one result and writes it; returns a line for whoever watches."""
    from studies.all_studies import STUDIES

    study = next(study for study in STUDIES if study.name == name)
    started, on_clock = time.process_time(), time.monotonic()
    measures = study.measure(arm, seed)
    seconds = time.process_time() - started
    result = {"arm": arm, "seed": seed, "settings": _plain(study.settings), "cpu_seconds": round(seconds, 1)}
    text = json.dumps({**result, "measures": measures}, indent=1)
    path = _path(study, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return f"{name}: {arm}, seed {seed}: {seconds:.0f} s of processor, {time.monotonic() - on_clock:.0f} s"


def _path(study: Study, arm: str, seed: int) -> Path:
    return WORK / "results" / study.name / f"{arm}-seed{seed}.json"


def _result(study: Study, arm: str, seed: int) -> dict[str, Any] | None:
    path = _path(study, arm, seed)
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result["settings"] == _plain(study.settings) else None


def _plain(settings: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(settings))


def collect(study: Study) -> Results:
    """Puts all results of a study into `docs/studies/NAME.json`, and returns them."""
    found = [_result(study, arm, seed) for arm in study.arms for seed in SEEDS]
    results = [result for result in found if result is not None]
    assert len(results) == len(found), f"{study.name} is not finished"
    facts = {
        "study": study.name,
        "settings": _plain(study.settings),
        "cpu_minutes": round(sum(result["cpu_seconds"] for result in results) / 60, 1),
        "results": [{key: result[key] for key in ("arm", "seed", "measures")} for result in results],
    }
    text = json.dumps(_rounded(facts), indent=None, separators=(",", ":")).replace('{"arm"', '\n{"arm"') + "\n"
    PAGES.mkdir(parents=True, exist_ok=True)
    write_atomically(PAGES / f"{study.name}.json", lambda path: path.write_text(text, encoding="utf-8"))
    return read_results(study.name)


def read_results(name: str) -> Results:
    """The results of a study as its page has them."""
    facts = json.loads((PAGES / f"{name}.json").read_text(encoding="utf-8"))
    of: dict[str, dict[int, Measures]] = {}
    for result in facts["results"]:
        of.setdefault(result["arm"], {})[result["seed"]] = result["measures"]
    return Results(facts["settings"], of, facts["cpu_minutes"])


def _rounded(value: Any) -> Any:
    """Floats to six significant digits: what is beyond them differs between machines."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
