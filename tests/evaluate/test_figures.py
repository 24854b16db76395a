"""The figures' numbers against the report's and closed forms; the command's pictures, page and numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sumizome.cli.main import main
from sumizome.data.buckets import BucketConfig, bucket_table
from sumizome.evaluate.data_figures import cropped_shares
from sumizome.evaluate.figures import matched_sigma, sigma_sequences, surviving_mean_error
from sumizome.models.networks import build_network
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tiny import tiny_unet_config


def test_the_sigma_sequences_are_the_report_s() -> None:
    sequences = sigma_sequences()
    assert [round(sigma, 1) for sigma in sequences["14.6"]] == [14.6, 10.7, 8.3, 6.6, 5.4]
    assert [round(sigma, 1) for sigma in sequences["29"]] == [29.0, 17.8, 12.4, 9.2, 7.2]


@pytest.mark.parametrize(("sigma", "side"), [(0.447, 16), (14.6, 16), (14.6, 128)])
def test_the_surviving_mean_misses_by_sigma_over_the_root_of_the_count(sigma: float, side: int) -> None:
    error = surviving_mean_error(torch.zeros(1, 4, side, side), sigma, draws=200)
    assert error == pytest.approx(sigma / side, rel=0.1)  # 800 draws: 2.5 % is one deviation
    assert surviving_mean_error(torch.zeros(1, 4, side, side), 0.0) == 0


def test_sdxl_s_own_canvas_has_the_report_s_sigmas(tiny: SDXLModel) -> None:
    assert matched_sigma(tiny, 14.6) == pytest.approx(14.6 * 16 / 128)
    unet = build_network("unet", tiny_unet_config() | {"sample_size": 128}, device="meta")
    large = replace(tiny, networks={**tiny.networks, "unet": unet})
    assert matched_sigma(large, 14.6) == 14.6


def test_crops_by_hand() -> None:
    """2:1 in a square loses half; in its own bucket nothing."""
    table = np.array([[128, 64], [96, 96], [64, 128]])
    square, bucketed = cropped_shares(np.array([[200, 100], [50, 50], [100, 200]]), table)
    side = math.isqrt(96 * 96)
    assert side == 96 and square == pytest.approx([0.5, 0, 0.5])
    assert bucketed == pytest.approx([0, 0, 0])


def test_of_the_report_s_own_buckets_less_is_cut_than_of_a_square() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(300, 2000, (5000, 2))
    square, bucketed = cropped_shares(sizes, bucket_table(BucketConfig(area=1024)))
    assert bucketed.mean() < square.mean() / 3


def test_the_command_draws_every_figure(tiny_folder: Path, tiny_latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    flags = ["--config.seeds", "2", "--config.steps", "6", "--config.opposing-prompts", "white", "black"]
    assert (
        main(["figures", "--model", str(tiny_folder), "--latents", str(tiny_latents), "--out", str(out), *flags]) == 0
    )
    facts = json.loads((out / "figures.json").read_text())
    assert list(facts["figures"]) == ["1", "2", "3", "4", "5-7", "8", "B"] and facts["left_out"] == {}
    assert all(figure["number"] for figure in facts["figures"].values())
    page = (out / "index.html").read_text()
    assert all(f'id="figure-{key}"' in page for key in facts["figures"])
    for key in ("1", "2", "3", "4", "5-7", "8"):
        with Image.open(out / f"figure-{key}.png") as image:
            assert min(image.size) > 100
    after = facts["figures"]["B"]["values"]["after"]
    assert after["mean"] == pytest.approx([0] * 4, abs=0.02) and after["std"] == pytest.approx([1] * 4, abs=0.02)
    ours = facts["figures"]["4"]["values"]
    # The same grid, without the steps above what 56.18 is on 16 × 16 latents.
    grid = [sigma for sigma, _ in ours["with_terminal_step"]]
    assert [sigma for sigma, _ in ours["without"]] == [sigma for sigma in grid if sigma <= 56.18 * 16 / 128]
    assert facts["figures"]["2"]["values"]["finite_sigma"] == pytest.approx(14.6146 / 8)
    assert ours["with_terminal_step"][0][0] == 20000
    opposing = facts["figures"]["3"]["values"]
    bright, dark = opposing["prompts"]
    assert (bright["prompt"], dark["prompt"]) == ("white", "black")
    for start in ("pure", "finite"):  # signed: a bright canvas where a dark one was asked for is no success
        gap = bright[start]["value"] - dark[start]["value"]
        assert opposing[start]["value"] == pytest.approx(gap, abs=1e-6) and opposing[start]["count"] == 2


def test_what_cannot_be_drawn_is_said(
    tiny: SDXLModel, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["figures", "--model", str(tiny_folder), "--out", str(tmp_path / "f")]
    assert main([*base, "--figures", "8"]) == 2
    assert "give --latents" in capsys.readouterr().err
    assert main([*base, "--figures", "1", "--picture", str(tmp_path / "nothing.png")]) == 2
    assert "nothing.png" in capsys.readouterr().err
    picture = tmp_path / "p.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    assert main([*base, "--figures", "1", "--picture", str(picture)]) == 0
    assert "14.6/128" in capsys.readouterr().out
