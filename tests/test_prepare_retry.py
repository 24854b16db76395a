"""Rejected pictures tried again: what can be read by now is added, what was there stays, and no run mistakes it."""

import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import AutoencoderKL
from preparing import (
    CONFIG,
    COUNT,
    draw_picture,
    drawn_set,
    exit_code,
    finish,
    killed_at_replace,
    killed_at_unlink,
    manifest_of,
    small_vae,
    start_preparer,
    tree_digest,
)
from test_prepare_update import encoded, samples

from sumizome import prepare_unit
from sumizome.cli.prepare import Command, run
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.latent_plan import Fingerprint, load_plan
from sumizome.data.latents import open_latents
from sumizome.data.manifest import Manifest, write_manifest
from sumizome.data.reject_table import read_rejects
from sumizome.data.retried import Readable
from sumizome.data.sealed_json import digest_of
from sumizome.data.store import LocalStore
from sumizome.errors import DataError, ShardError
from sumizome.prepare import _in_words, prepare_latents
from sumizome.prepare_store import prepared_to_store

__all__ = ["encoded"]

AWAY = (2, 3, 12, 19)
RENAMES = 1 + 3 + 2 * 3 + 2
"""of a retry: the plan, the new unit, index and record of three units that stay, the rejects, the plan as finished"""


@dataclass(frozen=True)
class Case:
    vae: AutoencoderKL
    manifest: Manifest
    fresh: Path
    """Prepared with all pictures at hand."""
    lacking: Path
    """Prepared while four were away: three missing, one half copied."""
    retried: Path
    """The same, tried again once they were back."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("retry")
    folder, manifest = drawn_set(root, "m.parquet")
    vae = small_vae()
    finish(manifest, vae, root / "fresh")
    shutil.copytree(folder, root / "kept")
    take_away(folder)
    finish(manifest, vae, root / "lacking")
    shutil.copytree(root / "kept", folder, dirs_exist_ok=True)
    shutil.copytree(root / "lacking", root / "retried")
    finish(manifest, vae, root / "retried", retry_rejects=True)
    return Case(vae, manifest, root / "fresh", root / "lacking", root / "retried")


def take_away(folder: Path) -> None:
    for number in AWAY[:-1]:
        (folder / f"p{number:02d}.png").unlink()
    half = folder / f"p{AWAY[-1]:02d}.png"
    half.write_bytes(half.read_bytes()[:100])


def without(case: Case, tmp_path: Path) -> Manifest:
    """The manifest with its pictures in a folder where the four are away."""
    folder = Path(shutil.copytree(case.manifest.sources[0], tmp_path / "pictures"))
    take_away(folder)
    return replace(case.manifest, sources=(folder,))


def reasons(out: Path) -> dict[str, str]:
    return {line.path: line.reason for line in read_rejects(out / "rejects.csv")}


def test_what_can_be_read_by_now_is_added_and_the_rest_stays(case: Case, tmp_path: Path, encoded: list[int]) -> None:
    away = {"p02.png": "missing", "p03.png": "missing", "p12.png": "missing", "p19.png": "changed"}
    assert reasons(case.lacking) == {**away, "p13.png": "aspect"}
    out = Path(shutil.copytree(case.lacking, tmp_path / "out"))
    before = tree_digest(out / "units")
    finish(case.manifest, case.vae, out)
    assert encoded == [], "without being asked, nothing is tried again"
    first, *_, last = prepare_latents(case.manifest, case.vae, out, CONFIG, retry_rejects=True)
    assert sum(encoded) == len(AWAY)
    assert "4 of 4 rejected pictures whose reason may pass can be read now" in first.notes[0]
    assert "a run that trained on them will not go on" in first.notes[0]
    assert (last.written, last.rejected) == (COUNT - 1, 1)
    assert before.items() <= tree_digest(out / "units").items(), "no unit that was there is made anew"
    assert samples(open_latents(out)) == samples(open_latents(case.fresh))
    assert reasons(out) == {"p13.png": "aspect"} == reasons(case.fresh)
    assert tree_digest(out) == tree_digest(case.retried)


def test_no_run_takes_the_new_latents_for_the_old(case: Case, tmp_path: Path) -> None:
    """A run goes on only with latents of its fingerprint."""
    prints = [open_latents(folder).fingerprint for folder in (case.lacking, case.retried)]
    assert len({each.digest for each in prints}) == 2 and len({each.latents_digest for each in prints}) == 1
    out = Path(shutil.copytree(case.retried, tmp_path / "out"))
    finish(case.manifest, case.vae, out)  # the plain command knows that it is finished
    assert tree_digest(out) == tree_digest(case.retried)
    told = replace(case.manifest, categories={"tag 3": "meta"})
    finish(told, case.vae, out)  # another manifest, and back: not the latents of before the retry
    finish(case.manifest, case.vae, out)
    assert open_latents(out).fingerprint == prints[1]


def test_without_a_retry_the_fingerprint_is_what_it_was(case: Case) -> None:
    """Folders, runs and exports of before go on to be recognised."""
    fingerprint: Fingerprint = open_latents(case.lacking).fingerprint
    old = {name: value for name, value in vars(fingerprint).items() if name != "retries"}
    assert fingerprint.digest == digest_of(old)
    assert fingerprint.latents_digest == digest_of({k: v for k, v in old.items() if k != "manifest_digest"})
    assert "retries" not in (case.lacking / "latents.json").read_text()


def test_where_nothing_can_be_read_nothing_is_changed(case: Case, tmp_path: Path, encoded: list[int]) -> None:
    out = Path(shutil.copytree(case.lacking, tmp_path / "out"))
    still = without(case, tmp_path)
    first, *_ = prepare_latents(still, case.vae, out, CONFIG, retry_rejects=True)
    assert first.notes == (
        "no rejected picture can be tried again now: nothing is changed",
        "3 pictures cannot be read",
        "1 picture is there but no longer the file that was ingested: run `sumizome ingest` again, then prepare",
    )
    assert tree_digest(out / "units") == tree_digest(case.lacking / "units")
    assert (out / "latents.json").read_bytes() == (case.lacking / "latents.json").read_bytes()
    whole = Path(shutil.copytree(case.fresh, tmp_path / "whole"))
    first, *_ = prepare_latents(case.manifest, case.vae, whole, CONFIG, retry_rejects=True)
    assert first.notes[0].startswith("no picture was rejected for a reason that may pass")
    assert tree_digest(whole) == tree_digest(case.fresh) and encoded == []


def test_many_that_are_still_away_are_no_missing_drive(case: Case, tmp_path: Path) -> None:
    """Twelve pictures were rejected; eleven fail again beside the one that is back."""
    folder = Path(shutil.copytree(case.manifest.sources[0], tmp_path / "pictures"))
    manifest = replace(case.manifest, sources=(folder,))
    for number in range(12):
        (folder / f"p{number:02d}.png").rename(tmp_path / f"p{number:02d}.png")
    config = replace(CONFIG, unit_size=16)
    finish(manifest, case.vae, tmp_path / "out", replace(config, max_failures=1.0))
    (tmp_path / "p05.png").rename(folder / "p05.png")
    last = finish(manifest, case.vae, tmp_path / "out", config, retry_rejects=True)
    assert (last.written, last.rejected) == (COUNT - 12, 12)
    with pytest.raises(DataError, match="Is a drive missing"):
        finish(manifest, case.vae, tmp_path / "fresh", config)


def test_latents_that_are_not_finished_are_finished_first(case: Case, tmp_path: Path) -> None:
    out, away = tmp_path / "out", without(case, tmp_path)
    steps = prepare_latents(away, case.vae, out, CONFIG, command="sumizome prepare m.parquet")
    for _ in range(5):
        next(steps)
    steps.close()
    with pytest.raises(ShardError, match=r"not finished.*run `sumizome prepare m\.parquet` to its end, then once more"):
        finish(case.manifest, case.vae, out, retry_rejects=True)
    new = tmp_path / "new"
    finish(case.manifest, case.vae, new, retry_rejects=True)
    assert tree_digest(new) == tree_digest(case.fresh), "where nothing was begun, nothing is tried again"


@pytest.mark.parametrize(
    ("kill", "retry_after"),
    [
        *((killed_at_replace(number, after=False), number % 3 > 0) for number in range(RENAMES)),
        (killed_at_replace(0, after=False), True),
        (killed_at_unlink(0), True),
        (killed_at_unlink(2), False),
    ],
)
def test_a_retry_killed_anywhere_goes_on_to_the_same_bytes(
    case: Case, tmp_path: Path, kill: object, retry_after: bool
) -> None:
    """With the same command, or with the plain one; until the end the latents of before can be trained on."""
    out = Path(shutil.copytree(case.lacking, tmp_path / "out"))
    exit_code(start_preparer(case.manifest, case.vae, out, arrange=kill, retry_rejects=True))  # type: ignore[arg-type]
    cache = open_latents(out)
    assert len(cache) == (COUNT - 5 if cache.fingerprint.retries == 0 else COUNT - 1)
    begun = (out / "latents.next.json").exists() or cache.fingerprint.retries > 0
    finish(case.manifest, case.vae, out, retry_rejects=retry_after)
    assert tree_digest(out) == tree_digest(case.retried if begun or retry_after else case.lacking)


@pytest.mark.parametrize(("number", "killed"), [(RENAMES - 1, True), (RENAMES, False)])
def test_the_kills_reach_to_the_end(case: Case, tmp_path: Path, number: int, killed: bool) -> None:
    out = Path(shutil.copytree(case.lacking, tmp_path / "out"))
    kill = killed_at_replace(number, after=True)
    child = start_preparer(case.manifest, case.vae, out, arrange=kill, retry_rejects=True)
    assert (exit_code(child) == -signal.SIGKILL) == killed


def test_several_preparers_share_one_retry(case: Case, tmp_path: Path) -> None:
    out = Path(shutil.copytree(case.lacking, tmp_path / "out"))
    both = [start_preparer(case.manifest, case.vae, out, retry_rejects=True) for _ in range(2)]
    assert [exit_code(each) for each in both] == [0, 0]
    assert tree_digest(out) == tree_digest(case.retried)
    assert load_plan(out).fingerprint.retries == 1


# ── A retry that gains nothing ──


def begun_in_vain(case: Case, tmp_path: Path) -> tuple[Path, Manifest]:
    """(latents whose rejects were being tried again, the manifest with the pictures away once more)."""
    out = Path(shutil.copytree(case.lacking, tmp_path / "out"))
    steps = prepare_latents(case.manifest, case.vae, out, CONFIG, retry_rejects=True)
    next(steps)
    steps.close()
    assert (out / "latents.next.json").exists()
    return out, without(case, tmp_path)


def latent_files(out: Path) -> dict[str, str]:
    """All but the rejects, which name the folder of the pictures."""
    return {name: digest for name, digest in tree_digest(out).items() if name != "rejects.csv"}


def test_a_retry_that_gains_nothing_leaves_the_latents_as_they_were(case: Case, tmp_path: Path) -> None:
    out, away = begun_in_vain(case, tmp_path)
    first, *_, last = prepare_latents(away, case.vae, out, CONFIG)
    assert "goes on with rejected pictures that were being tried again" in first.notes[0]
    assert "a run that trained on them will not go on" in first.notes[0]
    assert len(last.notes) == 1 and "the latents stay as they were" in last.notes[0]
    assert (last.written, last.rejected, last.begun_with) == (COUNT - 5, 5, COUNT - 5)
    assert open_latents(out).fingerprint == open_latents(case.lacking).fingerprint
    assert reasons(out) == reasons(case.lacking) and not (out / "latents.next.json").exists()
    # Nothing of the discarded retry passes for the next one's.
    finish(case.manifest, case.vae, out, retry_rejects=True)
    assert tree_digest(out) == tree_digest(case.retried)


VAIN_RENAMES = 3 + 1
"""of a retry that gains nothing: the new unit, the rejects"""


@pytest.mark.parametrize(
    "kill", [*(killed_at_replace(number, after=True) for number in range(VAIN_RENAMES)), killed_at_unlink(0), None]
)
def test_a_retry_that_gains_nothing_is_discarded_wherever_it_is_killed(
    case: Case, tmp_path: Path, kill: object
) -> None:
    out, away = begun_in_vain(case, tmp_path)
    code = exit_code(start_preparer(away, case.vae, out, arrange=kill))  # type: ignore[arg-type]
    assert code == (0 if kill is None else -signal.SIGKILL)
    assert len(open_latents(out)) == COUNT - 5
    again = Path(shutil.copytree(out, tmp_path / "again"))
    for _ in range(2):  # the first may have it to discard, the second removes what that left
        finish(away, case.vae, out)
    assert latent_files(out) == latent_files(case.lacking)
    kept = finish(case.manifest, case.vae, again, retry_rejects=True)
    assert kept.written in (COUNT - 5, COUNT - 1)
    finish(case.manifest, case.vae, again, retry_rejects=True)
    assert samples(open_latents(again)) == samples(open_latents(case.fresh))


def test_several_preparers_discard_one_retry(case: Case, tmp_path: Path) -> None:
    out, away = begun_in_vain(case, tmp_path)
    children = [start_preparer(away, case.vae, out) for _ in range(3)]
    assert [exit_code(each) for each in children] == [0, 0, 0]
    finish(away, case.vae, out)
    assert latent_files(out) == latent_files(case.lacking)


def test_whoever_comes_to_the_end_of_a_discarded_retry_finds_the_latents_as_they_were(
    case: Case, tmp_path: Path
) -> None:
    out, away = begun_in_vain(case, tmp_path)
    slow = prepare_latents(away, case.vae, out, CONFIG)
    next(slow)
    finish(away, case.vae, out)
    *_, last = slow
    assert (last.written, last.rejected) == (COUNT - 5, 5)
    assert open_latents(out).fingerprint == open_latents(case.lacking).fingerprint


# ── What passes, and what is told ──


def test_what_did_not_fit_in_memory_can_be_tried_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = prepare_unit.load_canvas

    def full(place: Path, *args: object, **settings: object) -> object:
        if place.name == "p04.png":
            raise ImageRejected("out_of_memory", "the picture does not fit in memory.")
        return load(place, *args, **settings)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(prepare_unit, "load_canvas", full)
        last = finish(case.manifest, case.vae, tmp_path / "out")
    assert (last.rejected, last.may_pass) == (2, 1)
    first, *_, last = prepare_latents(case.manifest, case.vae, tmp_path / "out", CONFIG, retry_rejects=True)
    assert first.notes[0].startswith("the one rejected picture whose reason may pass can be read now: with it the")
    assert (last.rejected, last.may_pass) == (1, 0)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Readable(1, 0, 0), ["the one rejected picture whose reason may pass cannot be read now: nothing is changed"]),
        (Readable(2, 0, 0), ["of 2 rejected pictures whose reason may pass none can be read now: nothing is changed"]),
        (
            Readable(2, 0, 2),
            [
                "no rejected picture can be tried again now: nothing is changed",
                "2 pictures are there but no longer the files that were ingested: run `sumizome ingest` again, "
                "then prepare",
            ],
        ),
        (
            Readable(3, 1, 1),
            [
                "1 of 3 rejected pictures whose reason may pass can be read now: with it the latents are another data "
                "set, and a run that trained on them will not go on",
                "1 picture is there but no longer the file that was ingested: run `sumizome ingest` again, "
                "then prepare",
            ],
        ),
    ],
)
def test_what_is_away_and_what_has_changed_are_told_apart(found: Readable, told: list[str]) -> None:
    assert _in_words(found) == told


def test_another_manifest_that_is_not_finished_is_no_retry(case: Case, tmp_path: Path) -> None:
    """Its plan counts more retries than the finished one, since it followed a retry that was begun."""
    out, away = begun_in_vain(case, tmp_path)
    told = replace(away, categories={"tag 3": "meta"})
    steps = prepare_latents(told, case.vae, out, CONFIG)
    assert not any("goes on" in note for note in next(steps).notes)
    steps.close()
    assert load_plan(out, finished=False).fingerprint.retries > load_plan(out).fingerprint.retries
    with pytest.raises(ShardError, match="is not finished"):
        finish(told, case.vae, out, retry_rejects=True)


def the_command(case: Case, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Into a folder that lacks four pictures."""
    monkeypatch.setattr("sumizome.models.sdxl.load_model", lambda *_, **__: SimpleNamespace(vae=case.vae))
    write_manifest(manifest, tmp_path / "m.parquet")
    out = Path(shutil.copytree(case.lacking, tmp_path / "out"))
    size = {"unit_size": CONFIG.unit_size, "batch_size": CONFIG.batch_size}
    return Command(tmp_path / "m.parquet", Path("m"), out, area=64, step=16, device="cpu", **size)


def test_the_command(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = replace(the_command(case, case.manifest, tmp_path, monkeypatch), retry_rejects=True)
    run(command)
    assert "4 of 4 rejected pictures" in capsys.readouterr().out
    assert "retry" not in open_latents(command.out).plan.command, "what mends a unit later is the plain command"
    assert samples(open_latents(command.out)) == samples(open_latents(case.fresh))


def test_the_command_tells_of_what_it_did_not_write_and_of_the_retry(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = the_command(case, without(case, tmp_path), tmp_path, monkeypatch)
    run(command)
    printed = capsys.readouterr().out
    assert "20 pictures: 20 of them had been prepared before, or by others, rejected ones counted" in printed
    assert f"{command.out} holds 15 latents; 5 pictures rejected, see {command.out}/rejects.csv; " in printed
    assert "4 for a reason that may pass: --retry-rejects tries them again" in printed
    assert "wrote" not in printed
    run(replace(command, retry_rejects=True))
    printed = capsys.readouterr().out
    assert "nothing is changed" in printed and "tries them again" not in printed and "wrote" not in printed


def test_the_command_counts_one_in_the_singular(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    draw_picture(tmp_path / "pictures", 0)
    one = manifest_of(tmp_path / "pictures", tmp_path / "one.parquet")
    command = replace(the_command(case, one, tmp_path, monkeypatch), out=tmp_path / "new")
    run(command)
    assert f"wrote 1 latent to {command.out}\n" in capsys.readouterr().out
    run(command)
    printed = capsys.readouterr().out
    assert "1 picture: it had been prepared before, or by others\n" in printed
    assert f"{command.out} holds 1 latent\n" in printed


def test_a_store_gets_what_a_retry_adds(case: Case, tmp_path: Path) -> None:
    store = LocalStore(Path(shutil.copytree(case.lacking, tmp_path / "store")))
    steps = prepare_latents(case.manifest, case.vae, tmp_path / "staging", CONFIG, retry_rejects=True)
    *_, last = prepared_to_store(steps, tmp_path / "staging", store)
    assert last.written == COUNT - 1
    assert tree_digest(tmp_path / "store") == tree_digest(case.retried)
