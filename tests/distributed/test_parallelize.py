"""Which strategy a run takes, and that what is applied to a network changes neither its numbers nor its names."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sumizome.distributed.parallelize import ParallelConfig, parallelize, resolve_strategy
from sumizome.distributed.runtime import Ranks, join_ranks
from sumizome.errors import ConfigError
from sumizome.models.networks import building_blocks


@pytest.mark.parametrize(
    ("strategy", "world", "expected"),
    [("auto", 1, "none"), ("auto", 2, "ddp"), ("fsdp", 1, "none"), ("fsdp", 4, "fsdp"), ("hybrid", 4, "hybrid")],
)
def test_the_strategy_follows_from_the_number_of_ranks(strategy: str, world: int, expected: str) -> None:
    assert resolve_strategy(ParallelConfig(strategy=strategy), Ranks(world=world, local_world=2)) == expected


def test_what_does_not_fit_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 processes were started"):
        resolve_strategy(ParallelConfig(strategy="none"), Ranks(world=2))
    with pytest.raises(ConfigError, match="does not divide the 4 ranks"):
        resolve_strategy(ParallelConfig(strategy="hybrid", shard_size=3), Ranks(world=4))


def test_an_environment_that_torchrun_did_not_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="torchrun"), join_ranks("cpu"):
        pass


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def test_checkpointed_and_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler's front end without its code generator, which takes minutes.
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: real(forward, backend="eager"))
    torch.manual_seed(0)
    plain, wrapped, x = Chain(), Chain(), torch.randn(2, 4)
    wrapped.load_state_dict(plain.state_dict())
    parallel = parallelize(
        {"chain": wrapped},
        lambda network: list(network.blocks),
        Ranks(),
        ParallelConfig(compile=True),
        activation_checkpointing=True,
    )
    plain(x).sum().backward()
    with parallel.accumulating(last=True):
        parallel.forward(wrapped, x).sum().backward()
    assert dict(wrapped.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    for mine, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_every_shape_of_sdxls_blocks_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch leaves a function uncompiled after eight versions, and SDXL's residual blocks alone have nine shapes."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: real(forward, backend="eager"))
    torch._dynamo.reset()
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 32),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=8,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    parallelize({"unet": unet}, building_blocks, Ranks(), ParallelConfig(compile=True))
    # Raised where a limit is met, else a warning among many.
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for height, width, rows in ((8, 8, 77), (8, 12, 77), (12, 8, 154)):
                unet(torch.randn(2, 4, height, width), 3, torch.randn(2, rows, 8))
    torch._dynamo.reset()
