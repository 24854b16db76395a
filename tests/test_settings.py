"""TOML and flags: one parser, the flag wins, an unknown key names the nearest, what is written reads back the same."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from sumizome.errors import ConfigError
from sumizome.settings import as_mapping, parse, read_toml, to_toml


@dataclass(frozen=True)
class Inner:
    """An inner table."""

    min_snr_gamma: float = 5.0
    kind: Literal["a", "b"] = "a"
    fast: bool = True


@dataclass(frozen=True)
class Outer:
    """A command."""

    model: Path
    words: tuple[str, ...] = ()
    canvas: tuple[int, int] = (64, 64)
    limit: float | None = None
    inner: Inner = field(default_factory=Inner)


def parsed(*arguments: str, config_type: type = Outer) -> Outer:
    return parse(config_type, arguments, prog="sumizome test", description=None)


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_flag_wins_over_the_file_wherever_it_stands(tmp_path: Path) -> None:
    file = toml(tmp_path, 'model = "m"\nwords = ["x", "y z"]\n[inner]\nmin_snr_gamma = 3\nfast = false')
    assert parsed(file) == Outer(Path("m"), ("x", "y z"), inner=Inner(3.0, "a", False))
    assert parsed("--inner.min-snr-gamma", "7", file).inner.min_snr_gamma == 7
    assert parsed(file, "--model", "n").model == Path("n")
    assert parsed(file, "--inner.fast").inner.fast


def test_a_path_that_ends_in_toml_is_still_a_flags_value() -> None:
    assert parsed("--model", "odd.toml").model == Path("odd.toml")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modle = 1", "unknown key 'modle'; did you mean 'model'?"),
        (
            'model = "m"\n[inner]\nmin_snr_gama = 3',
            "unknown key 'inner.min_snr_gama'; did you mean 'inner.min_snr_gamma'?",
        ),
        ('model = "m"\n[inner]\nqqqq = 3', "known keys: min_snr_gamma, kind, fast"),
        ('model = "m"\ninner = 3', "'inner' takes a table"),
        ("[model]\nx = 1", "'model' is a table"),
        ('model = "m"\n[inner]\nkind = "c"', "invalid choice 'c'"),
        ('model = "m"\n[inner]\nmin_snr_gamma = "five"', "could not convert string to float: 'five'"),
        ("canvas = [1, 2]", "--model"),
        ("this is no toml", "not valid TOML"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(toml(tmp_path, text))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_flag_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parsed(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match=r"--wrods.*--words.*see `sumizome test --help`") as caught:
        parsed("--model", "m", "--wrods", "x")
    assert "\n" not in str(caught.value)


def test_positionals_stay_positional(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Positional:
        """A command."""

        model: Annotated[Path, tyro.conf.Positional]
        steps: int = 1

    whole = toml(tmp_path, 'steps = 3\nmodel = "m.safetensors"')
    assert parsed(whole, config_type=Positional) == Positional(Path("m.safetensors"), 3)
    assert parsed("n", whole, config_type=Positional) == Positional(Path("n"), 3)
    file = toml(tmp_path, "steps = 3")
    assert parsed("m", file, config_type=Positional) == Positional(Path("m"), 3)
    assert parsed(file, "m", "--steps", "4", config_type=Positional) == Positional(Path("m"), 4)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: not text.startswith("-"))


@given(
    model=texts.map(lambda text: Path("m" + text.replace("\0", "") + "x")),
    words=st.lists(texts).map(tuple),
    gamma=st.floats(allow_nan=False),
    fast=st.booleans(),
    limit=st.none() | st.floats(allow_nan=False),
)
def test_what_is_written_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    model: Path,
    words: tuple[str, ...],
    gamma: float,
    fast: bool,
    limit: float | None,
) -> None:
    config = Outer(model, words, (1, 2), limit, Inner(gamma, "b", fast))
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert read_toml(path, Outer) == config
    assert as_mapping(config)["inner"] == {"min_snr_gamma": gamma, "kind": "b", "fast": fast}


@dataclass(frozen=True)
class Parts:
    """Free keys."""

    factors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WithParts:
    """A command with a table of free keys."""

    inner: Parts = field(default_factory=Parts)


def test_a_table_of_free_keys_is_a_flag_with_pairs_and_reads_back(tmp_path: Path) -> None:
    file = toml(tmp_path, '[inner.factors]\n"unet.up_blocks" = 0.5\ntext_encoder = 2\n')
    config = parse(WithParts, [file], prog="t", description=None)
    assert config.inner.factors == {"unet.up_blocks": 0.5, "text_encoder": 2.0}
    assert read_toml(Path(toml(tmp_path, to_toml(config))), WithParts) == config
    flags = ["--inner.factors", "a.b", "0.25"]
    assert parse(WithParts, flags, prog="t", description=None).inner.factors == {"a.b": 0.25}
    assert to_toml(WithParts()).strip() in ("", "[inner]")
