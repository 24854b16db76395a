"""LPIPS from a file, against VGG16 written out as torchvision numbers it; and files that are none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sumizome.errors import ModelError
from sumizome.vae.perceptual import load_lpips

PLAN = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
TAPS = (3, 8, 15, 22, 29)


def vgg16() -> nn.Sequential:
    """torchvision's `features`, by its configuration "D"."""
    layers: list[nn.Module] = []
    channels = 3
    for item in PLAN:
        if item == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, item, 3, padding=1), nn.ReLU()]
            channels = item
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Sequential, list[torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = vgg16()
        lins = [torch.rand(size) for size in (64, 128, 256, 512, 512)]
    ends = (0, 4, 9, 16, 23, 30)
    state = {
        f"net.slice{next(s for s in range(1, 6) if place < ends[s])}.{place}.{part}": tensor.clone()
        for place, layer in enumerate(network)
        for part, tensor in layer.state_dict().items()
    }
    state |= {f"lin{number}.model.1.weight": lin[None, :, None, None].clone() for number, lin in enumerate(lins)}
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(state, path)
    return path, network, lins


def test_it_is_the_distance_that_the_paper_defines(
    weights: tuple[Path, nn.Sequential, list[torch.Tensor]],
) -> None:
    path, network, lins = weights
    lpips = load_lpips(path)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = torch.zeros(2)
    x, y = ((each - shift[:, None, None]) / scale[:, None, None] for each in (a, b))
    taken = 0
    for place, layer in enumerate(network):
        x, y = layer(x), layer(y)
        if place in TAPS:
            unit_x, unit_y = (nn.functional.normalize(each, dim=1, eps=1e-10) for each in (x, y))
            weighted = (unit_x - unit_y) ** 2 * lins[taken][None, :, None, None]
            expected += weighted.sum(dim=1).mean(dim=(1, 2)).detach()
            taken += 1
    assert taken == 5
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-4, atol=1e-6)
    assert lpips(a, a).tolist() == [0, 0]


def test_gradients_reach_the_picture_and_not_the_network(
    weights: tuple[Path, nn.Sequential, list[torch.Tensor]],
) -> None:
    lpips = load_lpips(weights[0])
    a = torch.rand(1, 3, 32, 32).requires_grad_()
    lpips(a, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0
    assert all(p.grad is None for p in lpips.parameters())


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"net\.slice1\.0\.weight is missing"):
        load_lpips(tmp_path / "other.safetensors")
