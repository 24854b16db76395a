"""Hugging Face's imagefolder as its documentation lays it out: metadata beside the pictures, splits in folders."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_ingest import draw, reasons, rows

from sumizome.data.ingest import IngestResult, ingest
from sumizome.data.source_config import PictureRules, SourceConfig


def run(root: Path, rules: PictureRules | None = None) -> IngestResult:
    return ingest([SourceConfig(root, "imagefolder", rules=rules or PictureRules())], workers=0)


def tags(result: IngestResult) -> dict[str, list[str]]:
    return {path: row["tags"] for path, row in rows(result).items()}


CONTENT = [
    {"file_name": "0001.png", "text": "This is a golden retriever"},
    {"file_name": "sub/0002.png", "text": "a_cat, sleeping"},
]


def write(folder: Path, kind: str, content: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("source", ["imagefolder", "folder"])
def test_metadata_of_each_kind_in_each_split(tmp_path: Path, kind: str, source: str) -> None:
    for at, split in enumerate(("train", "test")):
        draw(tmp_path / split / "0001.png", 2 * at)
        draw(tmp_path / split / "sub" / "0002.png", 2 * at + 1)
        write(tmp_path / split, kind, [dict(row) for row in CONTENT])
    result = ingest([SourceConfig(tmp_path, source)], workers=0)  # type: ignore[arg-type]
    both = {"0001.png": ["This is a golden retriever"], "sub/0002.png": ["a cat", "sleeping"]}
    assert tags(result) == {f"{split}/{name}": found for split in ("test", "train") for name, found in both.items()}
    assert (result.rejects, result.files_ignored) == ([], 0)


def test_tags_are_lists_and_rows_have_ratings(tmp_path: Path) -> None:
    content: list[dict[str, object]] = [
        {
            "file_name": f"{at}.png",
            "caption": "words",
            "tags": ["blue_hair", "^_^"],
            "rating": "ge"[at % 2],
            "score": at,
        }
        for at in range(4)
    ]
    for at in range(5):
        draw(tmp_path / f"{at}.png", at)
    write(tmp_path, "parquet", content)
    rules = PictureRules(ratings=("g",), quality=("60=good",))
    result = run(tmp_path, rules)
    assert tags(result) == {"0.png": ["words", "blue hair", "^_^"], "2.png": ["words", "blue hair", "^_^", "good"]}
    expected = {"1.png": "rating_excluded", "3.png": "rating_excluded", "4.png": "record_missing"}
    assert reasons(result) == expected


def test_lines_that_name_nothing_of_the_folder_are_named(tmp_path: Path) -> None:
    secret = draw(tmp_path / "secret.png", 1)
    draw(tmp_path / "set" / "a.png", 2)
    draw(tmp_path / "set" / "b.png", 3)
    names = ["a.png", "../secret.png", str(secret), "none.png", "", "./a.png", "b.png"]
    write(tmp_path / "set", "jsonl", [{"file_name": name, "text": "t" * (name != "b.png")} for name in names])
    (tmp_path / "set" / "bad").mkdir()
    (tmp_path / "set" / "bad" / "metadata.parquet").write_bytes(b"PAR1 no")
    result = run(tmp_path / "set")
    assert tags(result) == {"a.png": ["t"], "b.png": []}
    assert (result.captions_empty, result.captions_missing) == (1, 0)
    assert reasons(result) == {
        "metadata.jsonl:2": "metadata_outside",
        "metadata.jsonl:3": "metadata_outside",
        "metadata.jsonl:4": "metadata_without_image",
        "metadata.jsonl:5": "metadata_invalid",
        "metadata.jsonl:6": "metadata_twice",
        "bad/metadata.parquet": "metadata_invalid",
    }
