"""`sumizome prompt explain`, read as a user reads it."""

import json

import pytest

from sumizome.cli.main import main


def _explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["prompt", "explain", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_chunks_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert _explained(capsys, "1girl, (red hair:1.2) BREAK night", "--syntax", "a1111") == [
        "chunk 1 · 5 of 75 tokens",
        "  1       1girl,",
        "  1.2     red hair",
        "chunk 2 · 1 of 75 tokens",
        "  1       night",
    ]


def test_versions_of_a_scheduled_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _explained(capsys, "[a|b] cat", "--syntax", "a1111", "--steps", "3")
    assert [line for line in lines if line.startswith("steps")] == ["steps 1, 3 · a cat", "steps 2 · b cat"]


def test_tokens_json_and_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert _explained(capsys, "{cat}", "--syntax", "novelai", "--tokens")[1].split() == ["2368", "1.05", "cat"]
    (version,) = json.loads("\n".join(_explained(capsys, "cat", "--json")))
    assert version["chunks"] == [[{"id": 2368, "weight": 1.0, "text": "cat"}]]
    lines = _explained(capsys, "tag, " * 80, "--max-chunks", "1")
    assert lines[-1].startswith("left out, beyond 1 chunks · tag,")


def test_impossible_numbers_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompt", "explain", "a", "--steps", "0"]) == 2
    assert "--steps" in capsys.readouterr().err
