"""The grid's measure and its training term: closed cases, real JPEG, and where their gradients go."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sumizome.vae.blockiness import blockiness, grid_energies, grid_steps
from sumizome.vae.crop_loader import to_pixels


def stairs(period: int, offset: int = 0, height: float = 0.05) -> torch.Tensor:
    """Flat stripes of `period` px, neighbours `height` apart, along the width."""
    levels = ((torch.arange(64) - offset) // period % 2) * height
    return levels.expand(1, 3, 64, 64).clone()


def test_energies_of_stairs_are_counted_by_hand() -> None:
    # Along the width every one of 7 grid lines is a step of 0.05 and no other place is; along the height nothing is.
    on, off = grid_energies(stairs(8))
    assert float(on) == pytest.approx(0.05**2 / 2, rel=1e-4)
    assert float(off) == 0
    # Stripes half a block away: as many steps, none on the grid.
    on, off = grid_energies(stairs(8, offset=4))
    assert float(on) == 0
    assert float(off) == pytest.approx(8 / 56 * 0.05**2 / 2, rel=1e-4)


def test_noise_and_flats_have_a_ratio_of_one() -> None:
    noise = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    assert float(blockiness(noise)) == pytest.approx(1, abs=0.01)
    assert float(blockiness(torch.zeros(1, 3, 32, 32))) == 1


@pytest.mark.parametrize("seed", range(3))
def test_jpeg_raises_it_and_the_more_the_lower_its_quality(seed: int) -> None:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((192, 192), Image.Resampling.BICUBIC)
    ratios = []
    for quality in (90, 30, 10):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        ratios.append(float(blockiness(to_pixels(np.array(Image.open(buffer)))[None])))
    assert float(blockiness(to_pixels(np.array(image))[None])) < ratios[0] < ratios[1] < ratios[2]
    assert ratios[1] > 1.5


def test_the_term_sees_the_grid_and_nothing_else() -> None:
    assert float(grid_steps(stairs(8))) > 0.1
    assert float(grid_steps(stairs(8, offset=4))) == 0
    assert float(grid_steps(stairs(16, offset=4))) == 0
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert float(grid_steps(ramp)) == pytest.approx(0, abs=1e-4)


def test_a_contour_on_the_grid_is_left_alone_and_a_faint_step_is_not() -> None:
    def push(height: float) -> float:
        x = stairs(8, height=height).requires_grad_()
        grid_steps(x).sum().backward()
        return float(x.grad.abs().max())

    assert push(0.03) > 100 * push(1.0)


def test_descending_the_term_takes_the_grid_away() -> None:
    x = (
        stairs(8, height=0.08) + 0.02 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    before = float(blockiness(x.detach()))
    optimizer = torch.optim.Adam([x], lr=0.002)
    for _ in range(60):
        optimizer.zero_grad()
        grid_steps(x).sum().backward()
        optimizer.step()
    assert before > 2
    assert float(blockiness(x.detach())) < 1.2


@given(st.integers(0, 2**31), st.sampled_from([(16, 24), (33, 64), (40, 17)]))
def test_a_transposed_or_mirrored_sample_keeps_its_place_in_the_batch(seed: int, size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    one, other = blockiness(x), blockiness(x.transpose(2, 3))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(blockiness(x.flip(0)), one.flip(0))
    assert (grid_steps(x) >= 0).all()


def test_a_picture_without_a_line_of_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="no line of a grid"):
        blockiness(torch.zeros(1, 3, 8, 32))
