"""Checkpoints in a second place, a folder or a real S3 server: whole there or not counted, verified on the way back."""

import shutil
from pathlib import Path

import pytest
import torch

from sumizome.data.store import open_store
from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError, StoreError
from sumizome.train.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints
from sumizome.train.mirror import CheckpointMirror
from sumizome.train.saver import Saver


def save(directory: Path, mirror: CheckpointMirror, steps: range) -> Saver:
    saver = Saver(directory, Ranks(), keep=2, mirror=mirror)
    for step in steps:
        weight = {"unet.w": torch.full((3,), float(step))}
        saver.save(Checkpoint(step, weight, weight, {"unet.w/exp_avg": weight["unet.w"]}))
    saver.finish()
    return saver


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "elsewhere")
    return f"{request.getfixturevalue('s3_bucket')}/runs/a"


def test_a_lost_run_directory_comes_back(address: str, tmp_path: Path) -> None:
    here, mirror = tmp_path / "checkpoints", CheckpointMirror(address, keep=2)
    assert mirror.bring_back(here) == []  # nothing there yet: a new run
    assert save(here, mirror, range(1, 5)).complaints == []
    there = {Path(name).parts[0] for name in open_store(address).list()}
    assert there == {"step-00000003", "step-00000004"}  # older ones are forgotten there too
    assert mirror.bring_back(here) == []  # what is here goes first
    shutil.rmtree(here)
    (told,) = mirror.bring_back(here)
    assert "step-00000004 was brought back" in told
    saved, complaints = latest_checkpoint(here)
    assert saved is not None
    assert complaints == []
    assert float(saved.read("weights")["unet.w"][0]) == 4.0


def test_what_is_damaged_there_is_named_and_the_one_before_used(address: str, tmp_path: Path) -> None:
    here, mirror, store = tmp_path / "checkpoints", CheckpointMirror(address, keep=2), open_store(address)
    save(here, mirror, range(1, 4))
    shutil.rmtree(here)
    name = next(name for name in store.list("step-00000003/ema"))
    store.write_bytes(name, b"\0" * store.size(name))
    damaged, brought = mirror.bring_back(here)
    assert name.split("/", 1)[1] in damaged
    assert "step-00000002 was brought back" in brought
    assert [path.name for path in here.iterdir()] == ["step-00000002"]
    shutil.rmtree(here)
    store.write_bytes("step-00000002/state.json", b"{}")
    with pytest.raises(CheckpointError, match="every checkpoint there is damaged"):
        mirror.bring_back(here)


def test_a_copy_without_its_manifest_is_not_counted(tmp_path: Path) -> None:
    here, mirror = tmp_path / "checkpoints", CheckpointMirror(str(tmp_path / "there"), keep=2)
    save(here, mirror, range(1, 3))
    (tmp_path / "there/step-00000002/manifest.json").unlink()
    shutil.rmtree(here)
    (told,) = mirror.bring_back(here)
    assert "step-00000001 was brought back" in told


def test_a_mirror_that_fails_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, mirror = tmp_path / "checkpoints", CheckpointMirror(str(tmp_path / "there"), keep=2)

    def unreachable(*_: object) -> None:
        raise StoreError("s3://bucket: no answer after 5 attempts")

    monkeypatch.setattr(mirror.store, "put_file", unreachable)
    saver = save(here, mirror, range(1, 3))
    assert len(saver.complaints) == 2
    assert "step-00000001 is not in the mirror: s3://bucket: no answer" in saver.complaints[0]
    assert [path.name for path in list_checkpoints(here)] == ["step-00000001", "step-00000002"]
