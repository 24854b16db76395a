"""The VAE at work: a picture's latent does not depend on its neighbours, and its time is counted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from preparing import CONFIG, draw_pictures, finish, manifest_of, small_vae

from sumizome.errors import ShardError
from sumizome.models.vae import encode_pixels
from sumizome.prepare_encoder import Encoder


def canvases(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 48, 80, 3), dtype=np.uint8)


def pixels(of: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(of).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_a_batch_is_encoded_as_by_hand_and_timed() -> None:
    vae = small_vae()
    encoder = Encoder(vae)
    found = encoder.finish(encoder.begin(canvases()))
    assert np.array_equal(found, encode_pixels(vae, pixels(canvases())).numpy())
    assert encoder.busy_seconds > 0


def test_neighbours_and_place_in_the_batch_leave_no_trace() -> None:
    """What lets an updated cache hold the bits of a fresh one."""
    encoder = Encoder(small_vae())
    together = encoder.finish(encoder.begin(canvases()))
    for number in range(3):
        for place in range(3):
            batch = np.zeros_like(canvases())
            batch[place] = canvases()[number]
            assert np.array_equal(encoder.finish(encoder.begin(batch))[place], together[number])


def test_bfloat16_is_near_and_other_latents(tmp_path: Path) -> None:
    vae = small_vae()
    exact, coarse = (
        Encoder(vae, kind).finish(Encoder(vae, kind).begin(canvases())) for kind in ("float32", "bfloat16")
    )
    assert coarse.dtype == np.float32 and not np.array_equal(exact, coarse)
    np.testing.assert_allclose(coarse, exact, atol=0.05 * np.abs(exact).max())
    (tmp_path / "pictures").mkdir()
    manifest = manifest_of(draw_pictures(tmp_path / "pictures", 3), tmp_path / "m.parquet")
    finish(manifest, vae, tmp_path / "out")
    with pytest.raises(ShardError, match="another precision"):
        finish(manifest, vae, tmp_path / "out", replace(CONFIG, precision="bfloat16"))


@pytest.mark.gpu
def test_on_cuda_batches_in_flight_do_not_mix() -> None:
    vae = small_vae().to("cuda")
    encoder = Encoder(vae)
    batches = [np.roll(canvases(), shift, axis=0) for shift in range(6)]
    in_flight = [encoder.begin(batch) for batch in batches]
    for batch, given in zip(batches, in_flight, strict=True):
        by_hand = encode_pixels(vae, pixels(batch)).cpu().numpy()
        np.testing.assert_allclose(encoder.finish(given), by_hand, atol=1e-5)
    assert encoder.busy_seconds > 0
