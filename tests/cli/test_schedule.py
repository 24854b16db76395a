"""`sumizome schedule`: the report's table, valid JSON, and flags that offer what the library offers."""

import json
import typing

import pytest

from sumizome.cli import schedule as cli
from sumizome.cli.main import main
from sumizome.cli.schedule import Command, run, schedule_rows
from sumizome.diffusion.loss import LossConfig, Weighting
from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.diffusion.sigmas import Grid


def _json(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, float]]:
    assert main(["schedule", "--json", *flags]) == 0

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    rows: list[dict[str, float]] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    return rows


def test_json_is_the_reports_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _json(capsys)
    assert len(rows) == 28
    assert all(list(row) == ["timestep", "sigma", "snr", "min_snr_weight", "loss_weight"] for row in rows)
    assert [row["timestep"] for row in rows] == list(range(999, -1, -37))
    assert [row["sigma"] for row in rows[:4]] == pytest.approx([20000, 56.178, 25.900, 15.960], rel=1e-4)
    assert rows[0]["snr"] == rows[0]["min_snr_weight"] == 0
    for row in rows[1:]:
        assert row["snr"] == pytest.approx(row["sigma"] ** -2)
        assert row["min_snr_weight"] == pytest.approx(min(row["snr"], 5) / (row["snr"] + 1))
    assert [row["loss_weight"] for row in rows] == pytest.approx(
        [max(row["min_snr_weight"], LossConfig().terminal_floor if row["snr"] < 1 else 0) for row in rows]
    )


def test_flags_reach_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    plain = _json(capsys, "--terminal-floor", "0", "--steps", "10")
    assert [row["loss_weight"] for row in plain] == [row["min_snr_weight"] for row in plain]
    gamma = _json(capsys, "--gamma", "1", "--sigma-max", "14.6")
    assert gamma[0]["sigma"] == 14.6
    assert max(row["min_snr_weight"] for row in gamma) <= 0.5
    own = _json(capsys, "--no-zero-terminal-snr", "--prediction-type", "epsilon")
    assert own[0]["sigma"] == pytest.approx(14.6146, rel=1e-5)
    assert own[0]["min_snr_weight"] == 1
    uniform = _json(capsys, "--weighting", "uniform", "--grid", "karras")
    assert {row["loss_weight"] for row in uniform} == {1}


def test_canvas_scales_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--canvas", "1024", "1024"], ["--sigma-max", "canvas"]):
        assert _json(capsys, *flags)[0]["sigma"] == pytest.approx(29.23, rel=1e-3)
    assert _json(capsys, "--canvas", "512", "512")[0]["sigma"] == pytest.approx(14.61, rel=1e-3)
    assert _json(capsys, "--canvas", "512", "512", "--sigma-max", "pure")[0]["sigma"] == 20000


def test_another_programs_infinity_is_pure_noise_too() -> None:
    first = schedule_rows(Command(sigma_max=4518.7637))[0]
    assert (first.timestep, first.sigma, first.snr) == (999, 4518.7637, 0)


def test_table_fits_a_terminal_of_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    run(Command())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    (first,) = [line.split() for line in lines if line.split()[:2] == ["1", "999"]]
    assert first[2:5] == ["20000", "0", "0"]
    assert any("plain MinSNR 0.03%" in line for line in lines)


def test_impossible_settings_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in [
        (["--prediction-type", "epsilon"], "v_prediction"),
        (["--sigma-max", "29", "--no-zero-terminal-snr"], "14.61"),
        (["--steps", "0"], "steps"),
        (["--sigma-max", "huge"], "--sigma-max"),
    ]:
        assert main(["schedule", *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_flags_offer_what_the_library_offers() -> None:
    """The command repeats these so that its help needs no torch."""
    hints = typing.get_type_hints(Command)
    assert hints["grid"] == Grid
    assert hints["prediction_type"] == PredictionType
    assert hints["weighting"] == Weighting
    command, loss = Command(), LossConfig()
    assert (command.weighting, command.gamma, command.terminal_floor) == (
        loss.weighting,
        loss.gamma,
        loss.terminal_floor,
    )
    assert command.zero_terminal_snr == ScheduleConfig().zero_terminal_snr
    assert cli.__doc__
