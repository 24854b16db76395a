"""Chunks as each program fills them, and what a weight does to an embedding, worked out by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sumizome.errors import ConfigError
from sumizome.models.sdxl import SDXLModel
from sumizome.models.text_encoding import CHUNK_LENGTH, CHUNK_TOKENS, chunk_prompt, encode_prompts, tokenize
from sumizome.models.weighted_prompts import chunk_weighted, encode_weighted
from sumizome.prompts import PromptSyntax

LONG = ", ".join(f"tag {number}" for number in range(40))


def _ids(prompt: str, syntax: PromptSyntax, max_chunks: int = 9) -> list[list[int]]:
    return [[token.id for token in chunk] for chunk in chunk_weighted(prompt, syntax, max_chunks).chunks]


@settings(max_examples=60)
@given(st.text(alphabet="ab1 ,.()é\n墨", max_size=400), st.integers(1, 3))
def test_plain_prompts_are_chunked_as_in_training(prompt: str, max_chunks: int) -> None:
    expected = chunk_prompt(prompt, max_chunks)
    weighted = chunk_weighted(prompt, "plain", max_chunks)
    assert tuple(tuple(token.id for token in chunk) for chunk in weighted.chunks) == expected.chunks
    assert weighted.dropped == expected.dropped.strip()


@pytest.mark.parametrize("syntax", ["plain", "a1111", "comfyui", "novelai"])
def test_every_token_of_a_long_prompt_is_in_some_chunk(syntax: PromptSyntax) -> None:
    chunks = _ids(LONG, syntax)
    assert len(chunks) > 1
    assert max(map(len, chunks)) <= CHUNK_TOKENS
    whole = chunk_prompt(LONG, 9)
    assert [i for chunk in chunks for i in chunk] == [i for chunk in whole.chunks for i in chunk]
    assert "".join(t.text for chunk in chunk_weighted(LONG, syntax, 9).chunks for t in chunk) == LONG


def test_a1111_breaks_after_a_comma_within_twenty_tokens() -> None:
    near = "x, " * 30 + "y " * 40  # the last comma is the 60th token: 15 before the end of the chunk
    assert list(map(len, _ids(near, "a1111"))) == [60, 40]
    far = "x, " * 20 + "y " * 40  # 35 before the end: too far, so the chunk is filled
    assert list(map(len, _ids(far, "a1111"))) == [75, 5]
    assert list(map(len, _ids("a BREAK b, c", "a1111"))) == [1, 3]


def test_comfyui_keeps_short_words_whole_and_breaks_long_ones() -> None:
    assert list(map(len, _ids("x " * 74 + "9876", "comfyui"))) == [74, 4]
    assert list(map(len, _ids("x " * 70 + "9876543210", "comfyui"))) == [75, 5]


def test_weights_follow_their_tokens_and_what_is_dropped_is_named() -> None:
    (chunk,) = chunk_weighted("1.5::red hair::, smile", "novelai").chunks
    assert [(token.text, token.weight) for token in chunk] == [
        ("red", 1.5), (" hair", 1.5), (",", 1.0), (" smile", 1.0),
    ]  # fmt: skip
    assert chunk_weighted(LONG + ", (the end:2)", "a1111", 1).dropped.endswith("the end")


@pytest.mark.parametrize("syntax", ["plain", "a1111", "comfyui", "novelai"])
def test_without_weights_nothing_changes(tiny: SDXLModel, syntax: PromptSyntax) -> None:
    prompts = ["1girl, red hair", "night sky"]
    embeds, pooled = encode_weighted(tiny.text_encoders, [chunk_weighted(p, syntax) for p in prompts], syntax)
    expected, expected_pooled = encode_prompts(tiny.text_encoders, tokenize(prompts).input_ids)
    assert torch.equal(embeds, expected)
    assert torch.equal(pooled, expected_pooled)


def _encoded(tiny: SDXLModel, prompt: str, syntax: PromptSyntax) -> torch.Tensor:
    return encode_weighted(tiny.text_encoders, [chunk_weighted(prompt, syntax)], syntax)[0][0]


def test_comfyui_moves_a_token_away_from_the_empty_prompt(tiny: SDXLModel) -> None:
    plain, empty = _encoded(tiny, "red hair", "comfyui"), _encoded(tiny, "", "comfyui")
    weighted = _encoded(tiny, "(red:1.5) hair", "comfyui")
    torch.testing.assert_close(weighted[1], empty[1] + 1.5 * (plain[1] - empty[1]))
    others = [0, *range(2, CHUNK_LENGTH)]
    assert torch.equal(weighted[others], plain[others])
    torch.testing.assert_close(_encoded(tiny, "(red:0) hair", "comfyui")[1], empty[1])


@pytest.mark.parametrize(("syntax", "prompt"), [("a1111", "(red:1.5) hair"), ("novelai", "1.5::red:: hair")])
def test_a1111_scales_a_token_and_restores_each_encoders_mean(
    tiny: SDXLModel, syntax: PromptSyntax, prompt: str
) -> None:
    plain, weighted = _encoded(tiny, "red hair", syntax), _encoded(tiny, prompt, syntax)
    width = tiny.text_encoders[0].config.hidden_size
    for columns in (slice(0, width), slice(width, None)):
        scaled = plain[:, columns].clone()
        scaled[1] *= 1.5
        expected = scaled * (plain[:, columns].mean() / scaled.mean())
        torch.testing.assert_close(weighted[:, columns], expected)
        torch.testing.assert_close(weighted[:, columns].mean(), plain[:, columns].mean())


@pytest.mark.parametrize(
    ("prompt", "syntax", "dtype"),
    [
        (f"a, ((cat:{10**30}):{10**30}), dog", "a1111", torch.float32),
        ("a, (cat:3.4e38), dog", "comfyui", torch.float32),
        ("a, " + "{" * 20_000 + "cat", "novelai", torch.float32),
        ("a, (cat:70000), dog", "a1111", torch.float16),
    ],
)
def test_weights_beyond_what_embeddings_can_bear_are_refused(
    tiny: SDXLModel, prompt: str, syntax: PromptSyntax, dtype: torch.dtype
) -> None:
    chunked = [chunk_weighted(text, syntax) for text in ("fine", prompt)]
    encoders = tiny.text_encoders if dtype == torch.float32 else copy.deepcopy(tiny.text_encoders).to(dtype)
    with pytest.raises(ConfigError, match=r"the weight of 'cat' is .* in all, more than") as refused:
        encode_weighted(encoders, chunked, syntax)
    assert "\n" not in str(refused.value)


def test_prompts_of_other_lengths_are_repeated_or_filled_up(tiny: SDXLModel) -> None:
    long, short = "a BREAK b BREAK c", "d BREAK e"
    chunked = [chunk_weighted(prompt, "a1111") for prompt in (long, short)]
    embeds, _ = encode_weighted(tiny.text_encoders, chunked, "a1111")
    assert embeds.shape[1] == 6 * CHUNK_LENGTH
    assert torch.equal(embeds[1, : 2 * CHUNK_LENGTH], embeds[1, 2 * CHUNK_LENGTH : 4 * CHUNK_LENGTH])
    chunked = [chunk_weighted(prompt, "plain") for prompt in (LONG * 2, "d")]
    embeds, _ = encode_weighted(tiny.text_encoders, chunked, "plain")
    assert embeds.shape[1] == len(chunked[0].chunks) * CHUNK_LENGTH
    empty, _ = encode_prompts(tiny.text_encoders, tokenize([""]).input_ids)
    torch.testing.assert_close(embeds[1, CHUNK_LENGTH : 2 * CHUNK_LENGTH], empty[0])
