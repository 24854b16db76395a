"""The mapped index: the same rows as in memory, made once, found whole or made anew, shared, and never trusted."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from latent_caches import tag_table

from sumizome.data import latents
from sumizome.data.index_cache import mapped_index
from sumizome.data.latent_index import LatentIndex
from sumizome.data.latent_plan import CachePlan, Fingerprint, write_plan
from sumizome.data.latents import open_latents
from sumizome.data.loader import build_loader
from sumizome.data.shards import commit_unit
from sumizome.data.tags import TagWeightConfig, tag_loss_weights
from sumizome.errors import DataError

FINGERPRINT = Fingerprint("v", 8, (0.0,) * 4, (1.0,) * 4, ((16, 8), (8, 16)), 4.0, "random", 0, "pillow-lanczos-1", "m")
COUNT = 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty samples in six units, one of them empty; tags of all kinds of letters, some pictures without any."""
    root = tmp_path / "latents"
    plan = CachePlan(FINGERPRINT, COUNT, 7, "sumizome prepare")
    write_plan(root, plan)
    for unit in range(plan.units):
        numbers = list(plan.rows(unit))
        columns = {
            "id": [f"{number % 30:016x}" + "-2" * (number >= 30) for number in numbers],
            "bucket_h": [16 - 8 * (number % 2) for number in numbers],
            "bucket_w": [8 + 8 * (number % 2) for number in numbers],
            "original_h": [100 + number for number in numbers],
            "original_w": [200 + number for number in numbers],
            "crop_top": [number % 3 for number in numbers],
            "crop_left": [number % 4 for number in numbers],
            "tags": [[f"tag {number}", "<ü>", "", "1girl"][: number % 5] for number in numbers],
            "kept_tags": [0 for _ in numbers],
            "repeats": [1 + number % 3 for number in numbers],
        }
        shapes = [(4, h // 8, w // 8) for h, w in zip(columns["bucket_h"], columns["bucket_w"], strict=True)]
        commit_unit(root, plan, unit, [np.full(shape, 1, np.float16) for shape in shapes], columns, [])
    return root


@pytest.fixture
def mapped(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`root`, large enough to be mapped."""
    monkeypatch.setattr(latents, "_MAPPED_FROM", 1)
    return root


def assert_same(one: LatentIndex, other: LatentIndex) -> None:
    assert one.columns.keys() == other.columns.keys()
    for name, column in one.columns.items():
        assert column.dtype == other.columns[name].dtype and np.array_equal(column, other.columns[name]), name


def test_mapped_rows_are_the_rows_in_memory(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = open_latents(root).index
    monkeypatch.setattr(latents, "_MAPPED_FROM", 1)
    index = open_latents(root, index_folder=tmp_path / "c").index
    assert_same(index, in_memory)
    rows = np.array([39, 0, 13, 13])
    assert index.ids(rows) == [f"{9:016x}-2", f"{0:016x}", f"{13:016x}", f"{13:016x}"]
    assert index.tag_lists(rows) == [["tag 39", "<ü>", "", "1girl"], [], ["tag 13", "<ü>", ""], ["tag 13", "<ü>", ""]]
    assert index.original[rows].tolist() == [[139, 239], [100, 200], [113, 213], [113, 213]]
    assert not index.row.flags.writeable and not index.columns["tag_codes"].flags.writeable
    assert index.picture_hash[9] == index.picture_hash[39] != index.picture_hash[8]


def test_it_is_made_once_and_shared(mapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "c"
    first = open_latents(mapped, index_folder=folder).index
    monkeypatch.setattr(latents, "load_unit_index", lambda *_: pytest.fail("it was read again"))
    assert_same(open_latents(mapped, index_folder=folder).index, first)


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "delete"])
def test_a_damaged_file_is_never_used(mapped: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "c"
    sound = {name: column.copy() for name, column in open_latents(mapped, index_folder=folder).index.columns.items()}
    (place,) = (path for path in folder.iterdir() if path.is_dir())
    names = sorted(path.name for path in place.iterdir())
    assert {"index.json", "tag_codes", "vocabulary_text"} <= set(names)
    for name in names:
        content = bytearray((place / name).read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 16
        (place / name).unlink()
        if damage != "delete":
            zero = bytes(len(content))
            (place / name).write_bytes({"truncate": content[:-1], "zero": zero, "flip": content}[damage])
        assert_same(open_latents(mapped, index_folder=folder).index, LatentIndex(sound))


def test_other_latents_have_another_index_and_the_last_three_stay(tmp_path: Path) -> None:
    def columns(number: int) -> Iterator[dict[str, np.ndarray]]:
        yield {"row": np.arange(number)}

    for number in range(5):
        index = mapped_index(tmp_path, f"key{number}", lambda number=number: columns(number))
        assert index.row.tolist() == list(range(number))
        os.utime(tmp_path / f"key{number}", (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "key2", "key3", "key4"]


def test_a_killed_maker_leaves_nothing_that_counts(mapped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"

    def killed() -> Iterator[dict[str, np.ndarray]]:
        yield {"row": np.arange(5)}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped_index(folder, "key", killed)
    assert not (folder / "key").exists()
    assert mapped_index(folder, "key", lambda: iter([{"row": np.arange(3)}])).row.tolist() == [0, 1, 2]
    assert not list(folder.glob(".*.tmp"))


def test_processes_that_open_at_once_make_it_once(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys, time\nimport numpy as np\nfrom sumizome.data.index_cache import mapped_index\n"
        "def make():\n    time.sleep(0.5)\n    yield {'row': np.array([os.getpid()])}\n"
        "print(mapped_index(pathlib.Path(sys.argv[1]), 'key', make).row[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    makers = {int(process.communicate()[0]) for process in processes}
    assert len(makers) == 1 and makers < {process.pid for process in processes}


def test_a_disk_that_cannot_be_written_is_named(mapped: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        open_latents(mapped, index_folder=tmp_path / "file" / "c")


def test_a_run_on_mapped_rows_is_the_run_on_rows_in_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"seed": 1, "micro_batch_size": 2, "validation_count": 3, "tag_weights": TagWeightConfig(strength=0.5)}
    plain = build_loader(open_latents(root), **settings)
    monkeypatch.setattr(latents, "_MAPPED_FROM", 1)
    mapped = build_loader(open_latents(root, index_folder=tmp_path / "c"), **settings)
    for step in range(10):
        for one, other in zip(plain.step(step), mapped.step(step), strict=True):
            assert (one.sample_ids, one.captions) == (other.sample_ids, other.captions)
            assert one.tag_weight.tolist() == other.tag_weight.tolist()


def test_weights_in_parts_are_the_weights_of_the_table(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sumizome.data import latent_index
    from sumizome.data.tags import loss_weights

    index, config = open_latents(root).index, TagWeightConfig(strength=0.5, min_count=1)
    whole = tag_loss_weights(tag_table(index, np.arange(COUNT)), config, {"1girl": "people"})
    monkeypatch.setattr(latent_index, "_PART", 7)
    parts = loss_weights(index.coded_tags(), np.asarray(index.repeats), config, {"1girl": "people"})
    assert len(set(parts.tolist())) > 5 and np.allclose(parts, whole, rtol=1e-12)
