"""SSIM and MS-SSIM against torchmetrics, and at the ends of their range."""

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from sumizome.vae.similarity import SCALE_WEIGHTS, ms_ssim, scales_of, ssim


def pair(side: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, side // 8, side // 8, generator=generator) * 2 - 1
    a = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)
    return a, (a + noise * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def torchmetrics_ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Over the places whose window lies inside: its own mean takes in the mirrored border."""
    _, everywhere = structural_similarity_index_measure(b, a, data_range=2.0, reduction="none", return_full_image=True)
    return everywhere[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))


@pytest.mark.parametrize("noise", [0.02, 0.2, 0.6])
def test_ssim_is_torchmetrics(noise: float) -> None:
    a, b = pair(48, noise)
    torch.testing.assert_close(ssim(a, b), torchmetrics_ssim(a, b), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("side", "noise"), [(192, 0.1), (192, 0.5), (64, 0.1), (32, 0.1)])
def test_ms_ssim_is_torchmetrics_over_the_scales_that_fit(side: int, noise: float) -> None:
    a, b = pair(side, noise)
    weights = SCALE_WEIGHTS[: scales_of(side)]
    expected, x, y = torch.ones(2), a, b
    for weight in weights[:-1]:
        _, contrast = structural_similarity_index_measure(
            y, x, data_range=2.0, reduction="none", return_contrast_sensitivity=True
        )
        expected *= contrast ** (weight / sum(weights))
        x, y = (torch.nn.functional.avg_pool2d(each, 2) for each in (x, y))
    expected *= torchmetrics_ssim(x, y) ** (weights[-1] / sum(weights))
    torch.testing.assert_close(ms_ssim(a, b), expected, atol=5e-5, rtol=0)


def test_equal_pictures_have_one_and_nothing_in_common_has_none() -> None:
    a, _ = pair(64, 0)
    assert ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert ms_ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (ms_ssim(a, -a) < 0.02).all()


def test_two_flat_pictures_differ_in_luminance_alone() -> None:
    """Wang et al.: (2·μa·μb + c1) / (μa² + μb² + c1), c1 = (0.01·range)²."""
    flat = torch.ones(1, 3, 16, 16)
    expected = (2 * 0.5 * 0.2 + 0.0004) / (0.5**2 + 0.2**2 + 0.0004)
    assert float(ssim(0.5 * flat, 0.2 * flat)) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_finite_where_pictures_are_equal_flat_or_opposite() -> None:
    a, _ = pair(64, 0)
    for target in (a, torch.zeros_like(a), -a):
        x = a.clone().requires_grad_()
        ms_ssim(x, target).sum().backward()
        assert x.grad.isfinite().all()


def test_a_picture_smaller_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="less than the window"):
        scales_of(10)
