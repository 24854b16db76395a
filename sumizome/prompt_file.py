"""Prompt files as kohya's sd-scripts users have them: a prompt a line, with `--w --h --d --s --l --n` behind it.

    1girl, red hair, night --w 832 --h 1216 --d 7 --s 28 --l 5 --n lowres, blurry

width, height, seed, steps, guidance scale, negative prompt; what a line does not say comes from the command. Empty
lines and lines that begin with `#` are passed over. Here alone width stands before height, as the convention has it.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sumizome.errors import ConfigError
from sumizome.inference import PictureRequest

__all__ = ["parse_prompt_line", "read_prompt_file"]

_Number = TypeVar("_Number", int, float)
_OPTION = re.compile(r"\s+--(\w+)(?:\s+|$)")
_KNOWN = "--w (width), --h (height), --d (seed), --s (steps), --l (guidance scale), --n (negative prompt)"


def read_prompt_file(path: Path, defaults: PictureRequest) -> list[PictureRequest]:
    """The file's requests in order; one without `--d` gets the default's seed plus its number in the file.

    Raises: ConfigError naming the line that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as UTF-8 text ({error}); give a file with a prompt a line"
        ) from error
    return list(_requests(path, text, defaults))


def _requests(path: Path, text: str, defaults: PictureRequest) -> Iterator[PictureRequest]:
    index = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                yield parse_prompt_line(line, replace(defaults, seed=defaults.seed + index))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
            index += 1


def parse_prompt_line(line: str, defaults: PictureRequest) -> PictureRequest:
    """The request that a line describes.

    Raises: ConfigError for an unknown option or a value that is no number.
    """
    prompt, *rest = _OPTION.split(" " + line.strip())
    options = dict(zip(rest[::2], (value.strip() for value in rest[1::2]), strict=True))
    unknown = options.keys() - {"w", "h", "d", "s", "l", "n"}
    if unknown:
        raise ConfigError(f"unknown option --{min(unknown)}; a prompt line knows {_KNOWN}")
    height, width = defaults.canvas
    sampling = defaults.sampling
    return replace(
        defaults,
        prompt=prompt.strip(),
        negative_prompt=options.get("n", defaults.negative_prompt),
        canvas=(_number(options, "h", int, height), _number(options, "w", int, width)),
        seed=_number(options, "d", int, defaults.seed),
        sampling=replace(
            sampling,
            steps=_number(options, "s", int, sampling.steps),
            guidance=replace(
                sampling.guidance, guidance_scale=_number(options, "l", float, sampling.guidance.guidance_scale)
            ),
        ),
    )


def _number(options: dict[str, str], name: str, kind: type[_Number], default: _Number) -> _Number:
    if name not in options:
        return default
    try:
        return kind(options[name])
    except ValueError as error:
        raise ConfigError(f"--{name} takes a number, found '{options[name]}'") from error
