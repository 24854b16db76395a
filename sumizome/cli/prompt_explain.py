"""Show what a prompt becomes: its chunks of 75 tokens, each token's weight, and what does not fit.

sumizome prompt explain "1girl, (red hair:1.2), night sky" --syntax a1111
sumizome prompt explain "1girl, 1.5::red hair::, [simple background]" --syntax novelai --tokens
"""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from sumizome.prompts import PromptSyntax

if TYPE_CHECKING:
    from sumizome.models.weighted_prompts import Token, WeightedPrompt

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome prompt explain` takes."""

    prompt: Annotated[str, tyro.conf.Positional]
    """The prompt, quoted."""
    syntax: PromptSyntax = "plain"
    """plain: the words alone, as in training. a1111: (x) [x] (x:1.3) BREAK [a:b:0.4] [a|b]. comfyui: (x) (x:1.3).
    novelai: {x} [x] 1.5::x::."""
    steps: int = 28
    """Sampling steps, for prompts that change while sampling."""
    max_chunks: int = 3
    """Chunks that sampling would take."""
    tokens: bool = False
    """Show every token with its id, instead of the words."""
    json: bool = False
    """Print JSON instead of text."""


def run(command: Command) -> None:
    """Prints each version of the prompt."""
    from sumizome.errors import ConfigError
    from sumizome.models.weighted_prompts import chunk_weighted
    from sumizome.prompts import scheduled

    if command.steps < 1 or command.max_chunks < 1:
        raise ConfigError(f"--steps and --max-chunks take 1 or more, found {command.steps} and {command.max_chunks}")
    by_step = scheduled(command.prompt, command.syntax, command.steps)
    versions = dict.fromkeys(by_step)
    chunked = {text: chunk_weighted(text, command.syntax, command.max_chunks) for text in versions}
    steps = {text: [step for step, at_step in enumerate(by_step, start=1) if at_step == text] for text in versions}
    if command.json:
        print(
            json.dumps([{"steps": steps[text], "prompt": text, **asdict(chunked[text])} for text in versions], indent=2)
        )
        return
    for text in versions:
        if len(versions) > 1:
            print(f"steps {_ranges(steps[text])} · {text}")
        _print_chunks(chunked[text], command.tokens)


def _print_chunks(prompt: "WeightedPrompt", tokens: bool) -> None:
    for number, chunk in enumerate(prompt.chunks, start=1):
        print(f"chunk {number} · {len(chunk)} of 75 tokens")
        if tokens:
            for token in chunk:
                print(f"  {token.id:>6}  {token.weight:<7.4g} {token.text.strip()}")
        else:
            for weight, words in _runs(chunk):
                print(f"  {weight:<7.4g} {words}")
    if prompt.dropped:
        print(f"left out, beyond {len(prompt.chunks)} chunks · {prompt.dropped}")


def _runs(chunk: "tuple[Token, ...]") -> list[tuple[float, str]]:
    """Consecutive words of one weight."""
    from itertools import groupby

    groups = groupby(chunk, key=lambda token: token.weight)
    return [(weight, " ".join("".join(token.text for token in alike).split())) for weight, alike in groups]


def _ranges(steps: list[int]) -> str:
    """`1–4, 9` for 1, 2, 3, 4, 9."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and runs[-1][-1] == step - 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
