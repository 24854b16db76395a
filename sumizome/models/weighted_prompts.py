"""Prompts with weights: their tokens in chunks, and the embeddings that the weights change.

Owns how each program fills chunks of 75 tokens and what a weight does to a token's embedding. The syntax itself is
`sumizome.prompts`, the encoders' read-out is `text_encoding`. The invariant: a prompt without marks in syntax "plain"
has exactly the chunks and embeddings of `text_encoding`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from sumizome.errors import ConfigError
from sumizome.models.text_encoding import (
    BOS,
    CHUNK_LENGTH,
    CHUNK_TOKENS,
    EOS,
    PADDING,
    build_tokenizer,
    encode_prompts,
)
from sumizome.prompts import Part, PromptSyntax, parse_prompt
from sumizome.shapes import PooledPromptEmbeds, PromptEmbeds

__all__ = ["Token", "WeightedPrompt", "chunk_weighted", "encode_weighted"]

_COMMA = 267
"""The id of "," as a word; A1111 looks for it alone, not for "),"."""
_BACKTRACK = 20
"""How many tokens back A1111 looks for a comma to break after."""
_LONG_WORD = 8
"""From this many tokens on, ComfyUI lets a word reach over two chunks."""


@dataclass(frozen=True)
class Token:
    """One token of a prompt."""

    id: int
    weight: float
    text: str
    """The letters of the prompt that it stands for."""


@dataclass(frozen=True)
class WeightedPrompt:
    """A prompt's tokens, without BOS, EOS and padding."""

    chunks: tuple[tuple[Token, ...], ...]
    """At least one, each of 0 to 75 tokens."""
    dropped: str = ""
    """The end of the prompt that did not fit, "" if all of it did."""


def chunk_weighted(prompt: str, syntax: PromptSyntax, max_chunks: int = 3) -> WeightedPrompt:
    """The prompt's tokens as the program of `syntax` fills its chunks, at most `max_chunks` of them.

    plain and novelai break after commas; a1111 after a comma among the last 20 tokens, and at BREAK; comfyui between
    words. The programs themselves have no limit. NovelAI does not say how it breaks: here it is done as in training.
    """
    chunks = [chunk for group in parse_prompt(prompt, syntax) for chunk in _filled(group, syntax)]
    kept, lost = chunks[:max_chunks], chunks[max_chunks:]
    return WeightedPrompt(tuple(map(tuple, kept)), "".join(token.text for chunk in lost for token in chunk).strip())


def _filled(parts: Sequence[Part], syntax: PromptSyntax) -> list[list[Token]]:
    """Chunks of one group of parts."""
    match syntax:
        case "plain" | "novelai":
            return _filled_by_tag(parts)
        case "a1111":
            return _filled_with_backtrack(token for part in parts for token in _tokens(part))
        case "comfyui":
            return _filled_by_word(parts)
        case _:
            assert_never(syntax)


def _tokens(part: Part) -> list[Token]:
    """The part's tokens; white space belongs to the token behind it, or to the last."""
    encoding = build_tokenizer().encode(part.text)
    ends = [end for _, end in encoding.offsets]
    if not ends:
        return []
    ends[-1] = len(part.text)
    starts = [0, *ends[:-1]]
    return [
        Token(index, part.weight, part.text[start:end])
        for index, start, end in zip(encoding.ids, starts, ends, strict=True)
    ]


def _filled_by_tag(parts: Sequence[Part]) -> list[list[Token]]:
    """Chunks broken after commas, as `text_encoding.chunk_prompt` breaks the same words without weights."""
    tokens = [token for part in parts for token in _tokens(part)]
    chunks: list[list[Token]] = [[]]
    for tag in _tags(tokens):
        if len(chunks[-1]) + len(tag) > CHUNK_TOKENS and chunks[-1]:
            chunks.append([])
        while len(chunks[-1]) + len(tag) > CHUNK_TOKENS:
            chunks[-1].extend(tag[:CHUNK_TOKENS])
            tag = tag[CHUNK_TOKENS:]
            chunks.append([])
        chunks[-1].extend(tag)
    return chunks


def _tags(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    tag: list[Token] = []
    for token in tokens:
        tag.append(token)
        if token.text.rstrip().endswith(","):
            yield tag
            tag = []
    if tag:
        yield tag


def _filled_with_backtrack(tokens: Iterator[Token]) -> list[list[Token]]:
    """A full chunk gives what stands behind its last comma, 20 tokens at most, to the next. Source: A1111's rule."""
    chunks: list[list[Token]] = [[]]
    last_comma: int | None = None
    for token in tokens:
        chunk = chunks[-1]
        if len(chunk) == CHUNK_TOKENS:
            if token.id != _COMMA and last_comma is not None and len(chunk) - last_comma <= _BACKTRACK:
                chunks.append(chunk[last_comma + 1 :])
                del chunk[last_comma + 1 :]
            else:
                chunks.append([])
            last_comma = None
        elif token.id == _COMMA:
            last_comma = len(chunk)
        chunks[-1].append(token)
    return chunks


def _filled_by_word(parts: Sequence[Part]) -> list[list[Token]]:
    """Chunks of whole words; only words of 8 tokens and more are broken. Source: ComfyUI's rule."""
    chunks: list[list[Token]] = [[]]
    for part in parts:
        for index, text in enumerate(part.text.replace("\n", " ").split(" ")):
            word = _tokens(Part(f" {text}" if index else text, part.weight))
            room = CHUNK_TOKENS - len(chunks[-1])
            if len(word) > room:
                if len(word) >= _LONG_WORD:
                    chunks[-1].extend(word[:room])
                    word = word[room:]
                chunks.append([])
            while len(word) > CHUNK_TOKENS:
                chunks[-1].extend(word[:CHUNK_TOKENS])
                word = word[CHUNK_TOKENS:]
                chunks.append([])
            chunks[-1].extend(word)
    return chunks


def encode_weighted(
    text_encoders: nn.ModuleList, prompts: Sequence[WeightedPrompt], syntax: PromptSyntax, num_chunks: int = 1
) -> tuple[PromptEmbeds, PooledPromptEmbeds]:
    """(prompt_embeds [b, 77·k, d₁+d₂], pooled [b, p]), the weights applied as the program of `syntax` does.

    Shorter prompts are filled up with empty chunks in "plain" and "novelai", as in training; a1111 and comfyui repeat
    them up to a common multiple, which attention does not see. Pooled is the first chunk's, unweighted.
    Raises: ConfigError for weights so large that embeddings, and with them the picture, would be no numbers.
    """
    longest = max(num_chunks, *(len(prompt.chunks) for prompt in prompts))
    weights = torch.ones(len(prompts), longest, CHUNK_LENGTH)
    for row, prompt in enumerate(prompts):
        for place, chunk in enumerate(prompt.chunks):
            weights[row, place, 1 : len(chunk) + 1] = torch.tensor([token.weight for token in chunk])
    embeds, pooled = encode_prompts(text_encoders, _input_ids(prompts, longest))
    if bool((weights != 1).any()):
        widths = [_width(encoder) for encoder in text_encoders]
        shape = (len(prompts), longest, CHUNK_LENGTH, sum(widths))
        weights = weights.to(embeds.device)
        if syntax == "comfyui":
            empty, _ = encode_prompts(text_encoders, _input_ids([WeightedPrompt(((),))], 1))
            embeds = _from_empty(embeds.reshape(shape), empty, weights).reshape(embeds.shape)
        else:
            embeds = _scaled(embeds.reshape(shape), weights, widths).reshape(embeds.shape)
        _check_finite(embeds, prompts)
    if syntax in ("a1111", "comfyui"):
        embeds = _repeated(embeds, [len(prompt.chunks) for prompt in prompts])
    return embeds, pooled


def _check_finite(embeds: Tensor, prompts: Sequence[WeightedPrompt]) -> None:
    # The parsers cannot say it: nested weights multiply, and how much is too much depends on the number format.
    for row, prompt in zip(embeds, prompts, strict=True):
        if not bool(row.isfinite().all()):
            tokens = [token for chunk in prompt.chunks for token in chunk]
            at_fault = max(tokens, key=lambda token: abs(token.weight))
            raise ConfigError(
                f"the weight of {at_fault.text.strip()!r} is {at_fault.weight:g} in all, more than embeddings in "
                f"{str(row.dtype).removeprefix('torch.')} can bear; nested weights multiply: take smaller ones"
            )


def _input_ids(prompts: Sequence[WeightedPrompt], chunks: int) -> Int64[Tensor, "2 b k 77"]:
    """Ids for both encoders, which pad differently; prompts of fewer chunks are filled up with empty ones."""
    ids = torch.empty(2, len(prompts), chunks, CHUNK_LENGTH, dtype=torch.int64)
    for encoder, padding in enumerate(PADDING):
        for row, prompt in enumerate(prompts):
            for place in range(chunks):
                chunk = [token.id for token in prompt.chunks[place]] if place < len(prompt.chunks) else []
                framed = [BOS, *chunk, EOS, *[padding] * (CHUNK_TOKENS - len(chunk))]
                ids[encoder, row, place] = torch.tensor(framed)
    return ids


def _from_empty(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Each state moved along the line from the empty prompt's at its position: e + w·(z − e). ComfyUI's way."""
    weight = weights[..., None].to(states.dtype)
    return torch.where(weight == 1, states, empty[0] + weight * (states - empty[0]))


def _width(text_encoder: PreTrainedModel) -> int:
    return int(text_encoder.config.hidden_size)


def _scaled(states: Tensor, weights: Tensor, widths: Sequence[int]) -> Tensor:
    """Each state times its weight, then each chunk scaled back to its mean, encoder by encoder. A1111's "Original".

    A chunk without weights stays as it is. Differs from A1111 in one thing: there the mean is taken over all prompts of
    a batch, so that a picture depends on its neighbours.
    """
    encoders = []
    for part in states.split(list(widths), dim=-1):
        weighted = part * weights[..., None].to(part.dtype)
        mean, after = part.mean(dim=(2, 3), keepdim=True), weighted.mean(dim=(2, 3), keepdim=True)
        marked = (weights != 1).any(dim=2)[..., None, None]
        encoders.append(torch.where(marked, weighted * (mean / after), part))
    return torch.cat(encoders, dim=-1)


def _repeated(embeds: Tensor, chunks: Sequence[int]) -> Tensor:
    """Each row's own chunks, repeated to the least common multiple of all rows' counts."""
    total = math.lcm(*chunks)
    rows = [row[: count * CHUNK_LENGTH].repeat(total // count, 1) for row, count in zip(embeds, chunks, strict=True)]
    return torch.stack(rows)
