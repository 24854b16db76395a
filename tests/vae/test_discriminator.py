"""Both sides of the adversary: whom each loss moves, its range, its warm-up, and that samples do not see each other."""

import pytest
import torch

from sumizome.errors import ConfigError
from sumizome.vae.discriminator import AdversarialConfig, build_discriminator, deceived, told_apart


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))


def test_each_loss_moves_its_own_side_only(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, decoded = images[0], images[1].requires_grad_()
    network = build_discriminator(AdversarialConfig(weight=0.1, width=8), seed=0)
    deceived(network, decoded).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert decoded.grad.abs().sum() > 0
    decoded.grad = None
    told_apart(network, real, decoded).sum().backward()
    assert decoded.grad is None
    assert all(p.grad is not None for p in network.parameters())


def test_it_learns_to_tell_flat_pictures_from_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    network = build_discriminator(AdversarialConfig(weight=0.1, width=8), seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(30):
        noise = torch.randn(4, 3, 32, 32, generator=generator).clamp(-1, 1)
        flat = (torch.rand(4, 3, 1, 1, generator=generator) * 2 - 1).expand(4, 3, 32, 32)
        loss = told_apart(network, flat, noise)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert float(loss.detach().mean()) < 0.2  # 1 is what knows nothing


def test_a_samples_loss_is_its_own(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    network = build_discriminator(AdversarialConfig(weight=0.1, width=8), seed=0)
    real, decoded = images
    together = told_apart(network, real, decoded)
    alone = torch.cat([told_apart(network, real[[i]], decoded[[i]]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_its_first_weights_follow_from_the_seed() -> None:
    config = AdversarialConfig(weight=0.1, width=8)
    one, again, other = (next(build_discriminator(config, seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert build_discriminator(AdversarialConfig(), 1) is None


def test_its_word_rises_over_the_warm_up() -> None:
    config = AdversarialConfig(weight=0.2, start=100, warmup_steps=50)
    assert [config.weight_at(step) for step in (0, 100, 125, 150, 1000)] == pytest.approx([0, 0, 0.1, 0.2, 0.2])
    with pytest.raises(ConfigError, match="multiple of 8"):
        AdversarialConfig(width=20)
