"""Prompts as other programs write them: weights, breaks, and parts that change while sampling.

Owns the three syntaxes as pure text → `Prompt`; knows no tokens. The invariant: what a program takes for plain text
comes back as plain text, so no prompt is ever an error.
"""

from typing import Literal, TypeAlias, assert_never

from sumizome.prompts import a1111, comfyui, novelai
from sumizome.prompts.parts import Part, Prompt
from sumizome.prompts.schedules import prompts_by_step

__all__ = ["Part", "Prompt", "PromptSyntax", "parse_prompt", "prompts_by_step", "scheduled"]

PromptSyntax: TypeAlias = Literal["plain", "a1111", "comfyui", "novelai"]
"""plain: the words and nothing else, what these models are trained on · a1111: (x), [x], (x:1.3), BREAK, [a:b:0.4],
[a|b] · comfyui: (x), (x:1.3) · novelai: {x}, [x], 1.5::x::."""


def parse_prompt(text: str, syntax: PromptSyntax) -> Prompt:
    """The weighted parts of a prompt whose schedules are resolved already (`scheduled`)."""
    match syntax:
        case "plain":
            return ((Part(text, 1.0),),)
        case "a1111":
            return a1111.parse(text)
        case "comfyui":
            return (comfyui.parse(text),)
        case "novelai":
            return (novelai.parse(text),)
        case _:
            assert_never(syntax)


def scheduled(text: str, syntax: PromptSyntax, steps: int) -> list[str]:
    """The prompt of each step: different ones only where the syntax has schedules and `text` uses them."""
    return prompts_by_step(text, steps) if syntax == "a1111" else [text] * steps
