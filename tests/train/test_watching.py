"""What a run tells: means by tag category and by part, peak FLOP by name, wandb without a network, and README.txt."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sumizome.device import peak_flop
from sumizome.distributed.runtime import Ranks
from sumizome.errors import ConfigError
from sumizome.inference import Picture
from sumizome.models.sdxl import SDXLModel
from sumizome.train import brightness as brightness_module
from sumizome.train.brightness import brightness
from sumizome.train.config import BrightnessConfig
from sumizome.train.gradient_norms import GradientNorms, global_norm
from sumizome.train.metrics import Metrics, read_metrics
from sumizome.train.wandb_writer import WandbWriter, check_wandb


def test_brightness_is_the_mean_of_the_pictures_and_its_error_that_of_each(
    tiny: SDXLModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shades = iter([0, 51, 255, 204])
    monkeypatch.setattr(
        brightness_module,
        "draw_pictures",
        lambda model, requests, **_: [Picture(r, Image.new("RGB", (8, 8), (next(shades),) * 3)) for r in requests],
    )
    config = BrightnessConfig(prompts=("black", "white"), wanted=(0.0, 1.0), seeds=2, canvas=(32, 32))
    found = brightness(tiny, config, Ranks())
    assert found["brightness"] == pytest.approx({"black": 0.1, "white": 0.9})
    assert found["brightness_error"] == pytest.approx((0 + 0.2 + 0 + 0.2) / 4)


@pytest.mark.parametrize("settings", [{"wanted": (0.5,)}, {"seeds": 0}, {"wanted": (0.0, 1.0, 2.0)}])
def test_a_brightness_test_that_cannot_be_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="brightness"):
        BrightnessConfig(**settings)


def test_norms_by_part_are_those_of_the_parts() -> None:
    names = {"unet.down_blocks.0.w": 3.0, "unet.down_blocks.1.w": 4.0, "unet.conv_in.w": 2.0, "text_encoder_2.w": 1.0}
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    for name, gradient in names.items():
        parameters[name].grad = torch.tensor([gradient])
    parameters["unet.mid_block.w"] = torch.nn.Parameter(torch.zeros(1))  # without a gradient
    norms = GradientNorms(parameters)()
    assert norms == {"unet.down_blocks": 5.0, "unet.rest": 2.0, "text_encoder_2": 1.0}
    assert float(global_norm(norms)) == pytest.approx(30**0.5)


def test_norms_by_part_are_those_of_tensors_of_any_shape() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(3,), (4, 3), (2, 3, 1, 1), (5,), ()]
    parameters = {f"unet.mid_block.{n}": torch.nn.Parameter(torch.zeros(shape)) for n, shape in enumerate(shapes)}
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=random)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters.values() if parameter.grad is not None])
    (norm,) = GradientNorms(parameters)().values()
    torch.testing.assert_close(norm, flat.norm())


def test_the_peak_is_found_by_the_drivers_name() -> None:
    assert peak_flop("NVIDIA H100 80GB HBM3", tf32=False) == 989e12
    assert peak_flop("NVIDIA A100-SXM4-80GB", tf32=True) == 156e12
    assert peak_flop("NVIDIA GeForce RTX 4090", tf32=False) == 165.2e12
    assert peak_flop("Some Other Card", tf32=False) is None


def test_wandb_keeps_a_run_offline_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        begin = partial(WandbWriter, tmp_path, "project", {"steps": 2})
        with Metrics(tmp_path, step - 1, False, begin) as metrics:
            metrics.write(step, {"loss": 0.5, "validation_loss": {"999": 0.25 * step}, "note": "text"})
            metrics.write_image(step, "previews", np.zeros((4, 4, 3), np.uint8))
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1  # one run, in two sessions at most
    written = b"".join(path.read_bytes() for path in files)
    for words in (b"validation_loss/999", b"0.25", b"previews"):
        assert words in written


def test_wandb_that_is_missing_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"sumizome\[wandb\]"):
        check_wandb("project")


def test_wandb_that_does_not_begin_is_told_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WandbError(Exception):
        pass

    def init(**_: object) -> None:
        raise WandbError("api_key not configured\nmore lines")

    fake = SimpleNamespace(init=init, Settings=dict, errors=SimpleNamespace(Error=WandbError))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Metrics(tmp_path, 0, False, partial(WandbWriter, tmp_path, "project", {})) as metrics:
        metrics.write(1, {"loss": 1})
        (told,) = metrics.take_complaints()
    assert told.startswith("wandb cannot be written (it does not begin the run: api_key not configured; log in with")
    assert "free some disk" not in told and "\n" not in told
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
