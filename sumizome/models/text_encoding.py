"""Prompts to token ids in chunks, and token ids to SDXL's embeddings.

Owns the tokenizer (CLIP's BPE, vendored, no hub), the chunking at tag boundaries and the two encoders'
read-out. It loads no weights. A chunk is BOS, up to 75 tokens, EOS, padding: 77 ids. The two encoders differ in
padding alone: the first pads with EOS, the second with "!" (id 0). Notation: `k` chunks, prompt rows are 77·k.
"""

import gzip
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int64
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from sumizome.shapes import PooledPromptEmbeds, PromptEmbeds

__all__ = [
    "CHUNK_LENGTH",
    "CHUNK_TOKENS",
    "ChunkedPrompt",
    "PromptTokens",
    "bpe_vocabulary",
    "build_tokenizer",
    "chunk_prompt",
    "count_chunks",
    "encode_prompts",
    "tokenize",
]

CHUNK_LENGTH = 77
CHUNK_TOKENS = 75
"""Tokens of the prompt in one chunk; BOS and EOS are the other two."""
BOS, EOS = 49406, 49407
PADDING = (EOS, 0)
"""The padding id of each encoder: SDXL's second was trained with zeros, which are "!" in this vocabulary."""

_BPE_FILE = Path(__file__).parent / "assets" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2
"""Lines of the file that CLIP uses: 49 152 ids less the bytes and the two special tokens."""
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@lru_cache(maxsize=1)
def bpe_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary (token → id, 49 408 of them) and its merges in order of priority."""
    with gzip.open(_BPE_FILE, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _MERGES + 1]  # the first line is the file's version
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    letters = _byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """The 256 byte values as printable letters, in CLIP's order: printable Latin-1 first, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]


@lru_cache(maxsize=1)
def build_tokenizer() -> Tokenizer:
    """CLIP's BPE without special tokens: text in, ids of the words out.

    Differs from CLIPTokenizer in one thing: "<|endoftext|>" typed in a prompt is text, because as a token it
    would end the prompt early and move the pooled state.
    """
    vocabulary, merges = bpe_vocabulary()
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@lru_cache(maxsize=1)
def _comma_ids() -> frozenset[int]:
    """Ids of tokens that end a word with a comma: ",", but also "),", as CLIP keeps punctuation together."""
    return frozenset(index for token, index in bpe_vocabulary()[0].items() if token.endswith(",</w>"))


@dataclass(frozen=True)
class ChunkedPrompt:
    """A prompt's token ids, without BOS, EOS and padding."""

    chunks: tuple[tuple[int, ...], ...]
    """At least one, each of 0 to 75 ids."""
    dropped: str
    """The end of the prompt that did not fit, "" if all of it did."""


def chunk_prompt(prompt: str, max_chunks: int = 3) -> ChunkedPrompt:
    """The prompt's tokens in at most `max_chunks` chunks of 75, broken after commas so that no tag is torn.

    Chunks are filled greedily in order. Only a tag that is longer than a chunk is broken inside.
    Source: report §4.2 (contexts of 75 tokens concatenated; breaking at tags is ours).
    """
    chunks: list[list[int]] = [[]]
    tags = [tag for piece in _pieces(prompt) for tag in _tags_of(piece)]
    length = sum(map(len, tags))
    if max_chunks and length <= CHUNK_TOKENS:
        return ChunkedPrompt((tuple(itertools.chain.from_iterable(tags)),), "")
    for tag in tags:
        if len(chunks[-1]) + len(tag) > CHUNK_TOKENS and chunks[-1]:
            chunks.append([])
        for first in range(0, len(tag), CHUNK_TOKENS):
            if first:
                chunks.append([])
            chunks[-1].extend(tag[first : first + CHUNK_TOKENS])
    kept = chunks[:max_chunks]
    used = sum(map(len, kept))
    return ChunkedPrompt(tuple(map(tuple, kept)), prompt[_place_of_token(prompt, used) :] if used < length else "")


def _place_of_token(prompt: str, number: int) -> int:
    """Where in the prompt the token of that number begins, in characters; only the piece that holds it is encoded."""
    place = 0
    for piece in _pieces(prompt):
        tokens = sum(map(len, _tags_of(piece)))
        if number < tokens:
            begins_it = number == 0 and not piece[0].isspace()  # as a tag that did not fit mostly does
            return place if begins_it else place + build_tokenizer().encode(piece).offsets[number][0]
        number -= tokens
        place += len(piece) + 1  # and the space after it
    return len(prompt)


@lru_cache(maxsize=1 << 14)
def _tags_of(piece: str) -> tuple[tuple[int, ...], ...]:
    """Token ids of a piece's tags, each with its comma. Remembered: most tags come again within a few batches."""
    commas = _comma_ids()
    ids = build_tokenizer().encode(piece).ids
    ends = [place + 1 for place, token in enumerate(ids) if token in commas]
    return tuple(tuple(ids[start:end]) for start, end in itertools.pairwise([0, *ends, len(ids)]) if end > start)


def count_chunks(prompts: Sequence[str]) -> Int[np.ndarray, "n 2"]:
    """(tokens, chunks that they need) of each prompt, as `chunk_prompt` fills them without a limit; for statistics.

    No word reaches over a space, so what stands between ", " is tokenised once however many prompts hold it.
    """
    pieces = [_pieces(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(piece for each in pieces for piece in each))
    lengths = dict(zip(distinct, _tag_lengths(distinct), strict=True))
    counts = np.zeros((len(prompts), 2), np.int64)
    for row, each in enumerate(pieces):
        tags = [length for piece in each for length in lengths[piece]]
        counts[row] = sum(tags), _chunks_of(tags)
    return counts


def _pieces(prompt: str) -> list[str]:
    *closed, last = prompt.split(", ")
    return [f"{piece}," for piece in closed] + [last]


def _tag_lengths(texts: Sequence[str]) -> list[list[int]]:
    """Of each text the tokens of its tags, each with its comma."""
    commas = _comma_ids()
    lengths = []
    for encoding in build_tokenizer().encode_batch_fast(list(texts)):
        ends = [place + 1 for place, token in enumerate(encoding.ids) if token in commas]
        lengths.append([end - start for start, end in itertools.pairwise([0, *ends, len(encoding.ids)]) if end > start])
    return lengths


def _chunks_of(tag_lengths: Sequence[int]) -> int:
    """Chunks that tags of these lengths (in tokens) fill, greedily and in order."""
    chunks, filled = 1, 0
    for length in tag_lengths:
        if filled and filled + length > CHUNK_TOKENS:
            chunks, filled = chunks + 1, 0
        filled += length
        if filled > CHUNK_TOKENS:  # a tag longer than a chunk
            more = (filled - 1) // CHUNK_TOKENS
            chunks, filled = chunks + more, filled - more * CHUNK_TOKENS
    return chunks


@dataclass(frozen=True)
class PromptTokens:
    """A batch of prompts as ids for both encoders."""

    input_ids: Int64[Tensor, "2 b k 77"]
    """[encoder, sample, chunk, position]; shorter prompts are filled up with empty chunks."""
    dropped: tuple[str, ...]
    """What did not fit of each prompt ("" = nothing): the caller reports it."""


def tokenize(prompts: Sequence[str], max_chunks: int = 3) -> PromptTokens:
    """Ids for both encoders, as many chunks as the longest prompt needs."""
    chunked = [chunk_prompt(prompt, max_chunks) for prompt in prompts]
    k = max([1, *(len(prompt.chunks) for prompt in chunked)])
    input_ids = np.empty((2, len(prompts), k, CHUNK_LENGTH), np.int64)
    input_ids[:] = np.reshape(PADDING, (2, 1, 1, 1))
    input_ids[..., 0], input_ids[..., 1] = BOS, EOS
    for row, prompt in enumerate(chunked):
        for place, chunk in enumerate(prompt.chunks):
            input_ids[:, row, place, 1 : 2 + len(chunk)] = (*chunk, EOS)
    return PromptTokens(torch.from_numpy(input_ids), tuple(prompt.dropped for prompt in chunked))


def encode_prompts(
    text_encoders: nn.ModuleList, input_ids: Int64[Tensor, "2 b k 77"]
) -> tuple[PromptEmbeds, PooledPromptEmbeds]:
    """(prompt_embeds [b, 77·k, d₁+d₂], pooled [b, p]) of tokenised prompts. Gradients flow where parameters want them.

    The states are the penultimate layer's, without the final layer norm; each chunk is encoded alone and has
    positions 0…76. `pooled` is the second encoder's projected state at the first chunk's EOS, as A1111 and
    ComfyUI have it: the first chunk holds the tags that matter most. Source: report §4.2 (penultimate,
    concatenated); pooled is ours.
    """
    first, second = text_encoders
    _, batch, chunks, length = input_ids.shape
    ids = input_ids.to(next(first.parameters()).device).reshape(2, batch * chunks, length)
    states = first(ids[0], output_hidden_states=True).hidden_states[-2]
    output = second(ids[1], output_hidden_states=True)
    both = torch.cat([states, output.hidden_states[-2]], dim=-1)
    pooled = output.text_embeds.reshape(batch, chunks, -1)[:, 0]
    return both.reshape(batch, chunks * length, -1), pooled
