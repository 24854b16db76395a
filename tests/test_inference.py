"""Drawing: seeds as other programs count them, syntaxes, pictures over pictures, two passes, tiles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.samplers import SamplerName
from sumizome.diffusion.schedule import build_noise_schedule
from sumizome.diffusion.sigmas import build_sigmas
from sumizome.errors import ConfigError, DataError
from sumizome.inference import (
    PictureRequest,
    RedrawConfig,
    SamplingConfig,
    SecondPassConfig,
    draw_pictures,
    final_canvas,
    guided_denoiser,
    initial_noise,
)
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tiled_decode import decode_in_tiles
from sumizome.models.vae import decode_latents
from sumizome.redraw import load_start

FAST = SamplingConfig(steps=3, guidance=GuidanceConfig(2.0))
REQUEST = PictureRequest("a red cat", canvas=(48, 64), sampling=FAST)


def _draw(model: SDXLModel, *requests: PictureRequest, **options: int) -> list[np.ndarray]:
    return [np.asarray(picture.image) for picture in draw_pictures(model, requests, **options)]


def test_noise_is_that_of_comfyui_and_a1111() -> None:
    """ComfyUI draws a batch [rows, c, h, w] at once; A1111 draws each [c, h, w] from its own seed."""
    shape = (4, 12, 20)
    batch = torch.randn((3, *shape), generator=torch.Generator("cpu").manual_seed(7))
    assert all(torch.equal(initial_noise(7, shape, row), batch[row]) for row in range(3))
    torch.manual_seed(8)
    assert torch.equal(initial_noise(8, shape), torch.randn(shape))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde"])
def test_pictures_of_one_seed_differ_by_their_row(tiny: SDXLModel, sampler: SamplerName) -> None:
    """From pure noise the first step of a stochastic sampler forgets where it started: later noise must differ too."""
    request = replace(REQUEST, sampling=replace(FAST, sampler=sampler))
    first, third = _draw(tiny, request, replace(request, noise_row=2))
    assert np.abs(first.astype(int) - third).mean() > 10


def test_the_second_pass_of_one_seed_differs_by_its_row(tiny: SDXLModel) -> None:
    """At this level next to nothing of the first pass is left."""
    request = replace(REQUEST, second_pass=SecondPassConfig(1.0 + 1 / 3, steps=2, detail_sigma=1000.0), canvas=(48, 48))
    first, third = _draw(tiny, request, replace(request, noise_row=2))
    assert np.abs(first.astype(int) - third).mean() > 10


def test_a_repeated_batch_is_equal_to_the_last_bit(tiny: SDXLModel) -> None:
    requests = [REQUEST, replace(REQUEST, prompt="b", seed=5), replace(REQUEST, prompt="c")]
    *_, last = draw_pictures(tiny, requests)
    assert last.batch == (2, 3)
    repeated = _draw(tiny, *[last.request] * 3)[2]
    assert np.array_equal(repeated, np.asarray(last.image))


def test_weights_act_and_their_absence_does_not(tiny: SDXLModel) -> None:
    plain, same, weighted = _draw(
        tiny,
        REQUEST,
        replace(REQUEST, syntax="comfyui"),
        replace(REQUEST, prompt="a (red:1.9) cat", syntax="comfyui"),
        batch_size=1,
    )
    assert np.array_equal(plain, same)
    assert not np.array_equal(plain, weighted)


def test_schedules_change_the_prompt_at_their_step(tiny: SDXLModel) -> None:
    request = replace(REQUEST, prompt="[a red cat:night sky:2]", syntax="a1111")
    sigmas = build_sigmas("native", 3, build_noise_schedule(tiny.schedule_config))
    denoise = guided_denoiser(tiny, [request], sigmas=sigmas)
    before, after = (guided_denoiser(tiny, [replace(REQUEST, prompt=prompt)]) for prompt in ("a red cat", "night sky"))
    x = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    for step, sigma in enumerate(sigmas[:-1].tolist()):
        scaled = x * sigma
        assert torch.equal(denoise(scaled, sigma), (before if step < 2 else after)(scaled, sigma))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth gradient, and beside it a mask that is white in its right half."""
    folder = tmp_path_factory.mktemp("redraw")
    colours = np.array([[[250, 20, 20], [20, 250, 20]], [[20, 20, 250], [200, 200, 20]]], np.uint8)
    Image.fromarray(colours).resize((64, 48), Image.Resampling.BILINEAR).save(folder / "a.png")
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "a.png"


def test_weak_redrawing_stays_near_the_picture(tiny: SDXLModel, picture: Path) -> None:
    """With the fewest steps, from the lowest level of noise, only the VAE's own loss and a little noise remain."""
    start = load_start(tiny.vae, RedrawConfig(picture), (48, 64))
    assert start is not None and start.mask is None
    round_trip = ((decode_latents(tiny.vae, start.latents)[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    many = replace(FAST, steps=50)
    weak, strong = _draw(
        tiny,
        *(replace(REQUEST, sampling=many, redraw=RedrawConfig(picture, s)) for s in (0.02, 0.2)),
        batch_size=1,
    )
    near, far = (float(np.abs(drawn - round_trip).mean()) for drawn in (weak, strong))
    assert near < 4 < far


def test_outside_the_mask_the_picture_keeps_its_pixels(tiny: SDXLModel, picture: Path) -> None:
    redraw = RedrawConfig(picture, 1.0, picture.with_name("mask.png"))
    for sampler in ("euler", "dpmpp_sde", "euler_cfg_pp"):
        (drawn,) = _draw(tiny, replace(REQUEST, redraw=redraw, sampling=replace(FAST, sampler=sampler)))
        original = np.asarray(Image.open(picture))
        assert np.array_equal(drawn[:, :32], original[:, :32])
        assert np.abs(drawn[:, 32:].astype(int) - original[:, 32:]).mean() > 10


def test_a_picture_to_draw_over_is_upright_and_opaque(tiny: SDXLModel, picture: Path, tmp_path: Path) -> None:
    """Photographs lie on their side and say so; what is transparent is white, whatever colour hides beneath."""
    upright = Image.open(picture)
    exif = Image.Exif()
    exif[0x0112] = 3
    upright.rotate(180).save(tmp_path / "turned.png", exif=exif)
    hiding = np.dstack([np.asarray(upright), np.full((48, 64), 255, np.uint8)])
    hiding[:, 32:, 3] = 0
    Image.fromarray(hiding).save(tmp_path / "hiding.png")
    shown = hiding[:, :, :3].copy()
    shown[:, 32:] = 255
    Image.fromarray(shown).save(tmp_path / "shown.png")
    names = (picture, *(tmp_path / f"{name}.png" for name in ("turned", "hiding", "shown")))
    starts = [load_start(tiny.vae, RedrawConfig(name), (48, 64)) for name in names]
    whole, turned, hidden, white = (start.latents for start in starts if start is not None)
    assert torch.equal(whole, turned) and torch.equal(hidden, white)


@pytest.mark.parametrize("kind", ["sixteen bits", "strokes"])
def test_masks_of_other_kinds_mean_the_same(tiny: SDXLModel, picture: Path, tmp_path: Path, kind: str) -> None:
    plain = picture.with_name("mask.png")
    array = np.asarray(Image.open(plain))
    if kind == "sixteen bits":
        Image.fromarray(array.astype(np.uint16) // 255 * 60_000 + 300).save(tmp_path / "m.png")
    else:
        Image.fromarray(np.dstack([np.full((48, 64, 3), 255, np.uint8), array])).save(tmp_path / "m.png")
    start, same = (load_start(tiny.vae, RedrawConfig(picture, mask=m), (48, 64)) for m in (plain, tmp_path / "m.png"))
    assert start is not None and start.mask is not None and same is not None and same.mask is not None
    assert torch.allclose(start.mask, same.mask, atol=0.1)


def test_files_that_are_no_pictures_are_named(tiny: SDXLModel, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(DataError, match=r"x\.png"):
        _draw(tiny, replace(REQUEST, redraw=RedrawConfig(tmp_path / "x.png")))


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"strength": 1.5}, {"mask": Path("m.png")}])
def test_impossible_redraws_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="redraw"):
        RedrawConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"noise_row": -1}, {"noise_row": 10**9}, {"seed": 2**64}, {"seed": -(2**63) - 1}])
def test_noise_that_no_generator_has_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"noise_row|seed"):
        replace(REQUEST, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, -(2**63)])
def test_every_seed_of_64_bits_has_noise(seed: int) -> None:
    assert torch.isfinite(initial_noise(replace(REQUEST, seed=seed).seed, (4, 2, 2))).all()


def test_second_pass_refines_the_first_on_a_larger_canvas(tiny: SDXLModel) -> None:
    """With next to no noise upon it, the second pass can but enlarge the first."""
    small = replace(REQUEST, second_pass=SecondPassConfig())
    (first,) = _draw(tiny, small)
    faint = replace(REQUEST, second_pass=SecondPassConfig(2.0, steps=2, detail_sigma=0.02))
    (second,) = _draw(tiny, faint)
    assert final_canvas(faint) == (96, 128)
    assert second.shape == (96, 128, 3)
    enlarged = np.asarray(Image.fromarray(first).resize((128, 96), Image.Resampling.BICUBIC))
    (other,) = _draw(tiny, replace(faint, seed=9))
    alike, unlike = (np.corrcoef(drawn.ravel(), enlarged.ravel())[0, 1] for drawn in (second, other))
    assert alike > 0.6 > 0.3 > unlike
    with pytest.raises(ConfigError, match="multiples"):
        _draw(tiny, replace(REQUEST, second_pass=SecondPassConfig(1.1)))


def test_steps_of_both_passes_are_counted(tiny: SDXLModel) -> None:
    seen: list[tuple[int, int]] = []
    request = replace(REQUEST, canvas=(32, 64), second_pass=SecondPassConfig(1.5, steps=2))
    list(draw_pictures(tiny, [request], on_step=lambda done, total: seen.append((done, total))))
    assert seen == [(step, 5) for step in range(1, 6)]


def test_tiles_are_the_whole_picture_but_for_the_seams_tone(tiny: SDXLModel) -> None:
    latents = torch.randn(1, 4, 40, 52, generator=torch.Generator().manual_seed(0)) * 0.5
    whole = decode_latents(tiny.vae, latents)
    assert torch.equal(decode_in_tiles(tiny.vae, latents, 4096), whole)
    tiled = decode_in_tiles(tiny.vae, latents, 96)
    assert tiled.shape == whole.shape
    assert float((tiled - whole).square().mean().sqrt()) < 0.1
    constant = torch.zeros(1, 4, 40, 52)
    assert decode_in_tiles(tiny.vae, constant, 64).isfinite().all()
    with pytest.raises(ConfigError, match="decode_tile"):
        decode_in_tiles(tiny.vae, latents, 32)
