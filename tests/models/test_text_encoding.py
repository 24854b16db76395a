"""The tokenizer against transformers' own, chunks against hand-counted ones, embeddings against diffusers' rule."""

from functools import lru_cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from sumizome.models.sdxl import SDXLModel
from sumizome.models.text_encoding import (
    CHUNK_TOKENS,
    bpe_vocabulary,
    build_tokenizer,
    chunk_prompt,
    encode_prompts,
    tokenize,
)


def test_golden_ids_of_both_encoders() -> None:
    first, second = tokenize(["a photo of a cat"]).input_ids[:, 0, 0].tolist()
    assert first == [49406, 320, 1125, 539, 320, 2368, 49407] + [49407] * 70
    assert second == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 70


def test_vocabulary_is_clips() -> None:
    vocabulary, merges = bpe_vocabulary()
    assert len(vocabulary) == 49408 and len(merges) == 48894
    assert vocabulary["!"] == 0 and vocabulary["<|startoftext|>"] == 49406 and vocabulary["<|endoftext|>"] == 49407


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_any_text_gets_the_ids_of_transformers_tokenizer(text: str) -> None:
    assume("<|" not in text)  # special tokens are the one difference, tested below
    assert build_tokenizer().encode(text).ids == _reference()(text, add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=1)
def _reference() -> CLIPTokenizer:
    vocabulary, merges = bpe_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@pytest.mark.parametrize(
    "text",
    ["1girl, hatsune miku (vocaloid), :d, ^_^", "Café ÀÉ I'm DON'T 2010s", "初音ミク 🎉", "a,,b ,(c),d", " \t\n "],
)
def test_tag_like_text_gets_the_ids_of_transformers_tokenizer(text: str) -> None:
    assert build_tokenizer().encode(text).ids == _reference()(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_in_a_prompt_are_text() -> None:
    (ids,) = chunk_prompt("a cat <|endoftext|>, black hair").chunks
    assert 49407 not in ids and 49406 not in ids


def _tags(count: int) -> str:
    return ", ".join(["red"] * count)  # two tokens a tag, one for the last


def test_a_prompt_of_75_tokens_is_one_chunk_and_the_next_tag_opens_a_second() -> None:
    assert [len(chunk) for chunk in chunk_prompt(_tags(38)).chunks] == [75]
    assert [len(chunk) for chunk in chunk_prompt(_tags(39)).chunks] == [74, 3]


def test_no_tag_is_torn() -> None:
    tokenizer = build_tokenizer()
    tags = [f"{colour} hair {number}" for number in range(12) for colour in ("light blue", "dark red", "pink")]
    chunks = chunk_prompt(", ".join(tags), max_chunks=9).chunks
    assert len(chunks) > 1
    rejoined = [
        tag.strip() for chunk in chunks for tag in tokenizer.decode(list(chunk)).replace("</w>", " ").split(",")
    ]
    assert [tag.replace(" ", "") for tag in rejoined if tag] == [tag.replace(" ", "") for tag in tags]


def test_commas_that_end_an_emoticon_or_a_bracket_are_boundaries_too() -> None:
    chunks = chunk_prompt(", ".join(["miku (vocaloid)"] * 20), max_chunks=9).chunks
    last = build_tokenizer().id_to_token(chunks[0][-1])
    assert len(chunks) > 1 and last == "),</w>"


def test_a_tag_longer_than_a_chunk_is_broken_inside_and_nothing_is_lost() -> None:
    prompt = "red, " + "blue " * 200 + ", green"
    chunked = chunk_prompt(prompt, max_chunks=9)
    assert [len(chunk) for chunk in chunked.chunks] == [2, 75, 75, 52]  # 201 tokens of one tag, then the next
    assert sum(chunked.chunks, ()) == tuple(build_tokenizer().encode(prompt).ids)


def test_what_does_not_fit_is_reported_as_the_user_wrote_it() -> None:
    prompt = _tags(37) + ", " + _tags(37) + ", Dark Forest, Moon"
    chunked = chunk_prompt(prompt, max_chunks=2)
    assert chunked.dropped == "Dark Forest, Moon"
    assert chunk_prompt(prompt, max_chunks=3).dropped == ""


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.text(alphabet="ab (),1é\u0301", max_size=30), max_size=60),
    st.sampled_from([",", ", "]),
    st.integers(1, 4),
)
def test_chunks_are_a_prefix_of_the_tokens_and_the_rest_is_reported(
    tags: list[str], between: str, max_chunks: int
) -> None:
    prompt = between.join(tags)
    chunked = chunk_prompt(prompt, max_chunks)
    whole = build_tokenizer().encode(prompt)
    ids = tuple(whole.ids)
    kept = sum(chunked.chunks, ())
    assert 1 <= len(chunked.chunks) <= max_chunks
    assert all(len(chunk) <= CHUNK_TOKENS for chunk in chunked.chunks)
    assert kept == ids[: len(kept)]
    places = [start for start, _ in whole.offsets] + [len(prompt)]
    assert chunked.dropped == prompt[places[len(kept)] :]


def test_a_batch_has_the_chunks_of_its_longest_prompt_filled_with_empty_ones() -> None:
    tokens = tokenize(["red", _tags(60)])
    assert tokens.input_ids.shape == (2, 2, 2, 77)
    empty = tokenize([""]).input_ids[:, 0, 0]
    assert torch.equal(tokens.input_ids[:, 0, 1], empty)


def test_embeddings_are_the_penultimate_layer_without_final_norm(tiny: SDXLModel) -> None:
    tokens = tokenize(["1girl, blue hair", "night sky"])
    embeds, pooled = encode_prompts(tiny.text_encoders, tokens.input_ids)
    assert embeds.shape == (2, 77, 160) and pooled.shape == (2, 96)

    # By hand: two layers, so the penultimate state is what the first layer gives.
    captured: list[torch.Tensor] = []
    hooks = []
    for encoder in tiny.text_encoders:
        layers = next(module for name, module in encoder.named_modules() if name.endswith("encoder.layers"))
        hooks.append(layers[0].register_forward_hook(lambda _, __, output: captured.append(output)))
    first, second = tiny.text_encoders
    first(tokens.input_ids[0, :, 0])
    by_hand = second(tokens.input_ids[1, :, 0]).text_embeds
    for hook in hooks:
        hook.remove()
    states = [output[0] if isinstance(output, tuple) else output for output in captured]
    torch.testing.assert_close(embeds, torch.cat(states, dim=-1))
    torch.testing.assert_close(pooled, by_hand)


def test_each_chunk_is_encoded_alone_and_pooled_is_the_first_chunks(tiny: SDXLModel) -> None:
    tokens = tokenize([_tags(60)])
    embeds, pooled = encode_prompts(tiny.text_encoders, tokens.input_ids)
    assert embeds.shape == (1, 154, 160)
    for index in range(2):
        alone, alone_pooled = encode_prompts(tiny.text_encoders, tokens.input_ids[:, :, index : index + 1])
        torch.testing.assert_close(embeds[:, 77 * index : 77 * (index + 1)], alone)
        assert torch.allclose(pooled, alone_pooled, atol=1e-6) == (index == 0)


def test_gradients_reach_both_encoders(tiny: SDXLModel) -> None:
    embeds, pooled = encode_prompts(tiny.text_encoders, tokenize(["blue hair"]).input_ids)
    (embeds.square().sum() + pooled.square().sum()).backward()
    for encoder in tiny.text_encoders:
        embedding = encoder.get_input_embeddings().weight
        assert embedding.grad is not None and embedding.grad.abs().sum() > 0
        encoder.zero_grad(set_to_none=True)
