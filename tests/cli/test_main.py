"""The command line's face: quick help, one line for an error, status 2, and no traceback for a user's mistake."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from sumizome.cli import main as cli
from sumizome.cli.main import COMMANDS, main


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


def test_the_overview_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sumizome.cli.main import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'diffusers', 'PIL'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: sumizome {name}" in capsys.readouterr().out


@pytest.mark.parametrize("group", sorted({name.split()[0] for name in COMMANDS if " " in name}))
@pytest.mark.parametrize("flag", [["--help"], ["-h"], []])
def test_every_group_prints_its_commands(group: str, flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([group, *flag]) == 0
    text = capsys.readouterr().out
    for name, what in COMMANDS.items():
        assert (f"  {name} " in text and what in text) == name.startswith(f"{group} ")
    assert f"usage: sumizome {group} COMMAND" in text


def test_making_a_model_says_nothing_on_stderr(tmp_path: Path) -> None:
    """In a process of its own, as a user starts it: every import is there that could print something."""
    command = [sys.executable, "-m", "sumizome", "init", "--out", str(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_warning_of_bitsandbytes_is_silenced_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "No module named 'kernels'")
    assert caplog.records == []
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["latents", "--top", "3"], ["unknown command 'latents'", "did you mean 'latents stats'"]),
        (["latents", "stat"], ["unknown command 'latents stat'", "did you mean 'latents stats'"]),
        (["trian"], ["unknown command 'trian'", "did you mean 'train'"]),
        (["train", "none.toml"], ["none.toml", "cannot be read"]),
        (["train", "--stepz", "4"], ["--stepz", "sumizome train --help"]),
        (["sample", "--model", "nowhere", "--out", "x"], ["nothing to draw"]),
        (["sample", "--model", "/nowhere", "--out", "x", "--prompt", "p"], ["/nowhere"]),
        (["export", "/nowhere"], ["nothing to write"]),
        (["ingest", "/nowhere", "--manifest", "m.parquet"], ["/nowhere"]),
        (["prepare", "/nowhere.parquet", "--model", "m", "--out", "o"], ["/nowhere.parquet"]),
        (["init", "--out", "/dev/null/x"], ["/dev/null/x"]),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("sumizome: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "parse", broken)
    with pytest.raises(ZeroDivisionError):
        main(["schedule"])
