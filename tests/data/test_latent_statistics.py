"""Measured statistics against numpy over the same numbers, group by group; settings that cannot be are refused."""

from pathlib import Path

import numpy as np
import pytest

from sumizome.cli.main import main
from sumizome.data.buckets import BucketConfig
from sumizome.data.ingest import ingest
from sumizome.data.latent_statistics import (
    LATENT_PRESETS,
    LatentStatisticsConfig,
    measure_latents,
    stated_statistics,
)
from sumizome.data.latents import LatentCache, open_latents
from sumizome.errors import ConfigError, ShardError
from sumizome.models.sdxl import SDXLModel
from sumizome.prepare import PrepareConfig, prepare_latents
from sumizome.settings import parse, read_toml


@pytest.fixture(scope="module")
def cache(tagged_folder: Path, tiny: SDXLModel, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """Forty pictures in three buckets, in two units."""
    out = tmp_path_factory.mktemp("statistics") / "latents"
    manifest = ingest([tagged_folder], workers=0).manifest
    for _ in prepare_latents(manifest, tiny.vae, out, PrepareConfig(BucketConfig(area=64, step=16), unit_size=25)):
        pass
    return open_latents(out)


def every_latent(cache: LatentCache) -> list[np.ndarray]:
    """Each latent as float64 [c, h·w], in the order of the cache's rows."""
    return [
        cache.read(np.array([row])).numpy()[0].astype(np.float64).reshape(4, -1) for row in range(len(cache.index.row))
    ]


def test_sums_over_shards_are_those_of_all_numbers_at_once(cache: LatentCache) -> None:
    *_, (done, report) = measure_latents(cache)
    everything = np.concatenate(every_latent(cache), axis=1)
    assert done == report.whole.pictures == len(cache) and report.whole.numbers == everything.shape[1]
    np.testing.assert_allclose(report.whole.mean, everything.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(report.whole.std, everything.std(axis=1), rtol=1e-10)


def test_normalised_by_them_every_channel_has_mean_0_and_deviation_1(cache: LatentCache) -> None:
    *_, (_, report) = measure_latents(cache)
    other = cache.normalised_by(report.whole.mean, report.whole.std)
    rows = [np.flatnonzero(cache.index.bucket == bucket) for bucket in np.unique(cache.index.bucket)]
    numbers = np.concatenate(
        [other.normalise(other.read(r)).double().numpy().transpose(1, 0, 2, 3).reshape(4, -1) for r in rows], axis=1
    )
    np.testing.assert_allclose(numbers.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(numbers.std(axis=1), 1, atol=1e-6)
    assert cache.normalise(cache.read(rows[0])).ne(other.normalise(other.read(rows[0]))).any()  # the first is as it was
    with pytest.raises(ConfigError, match="4 channels"):
        cache.normalised_by((0.0,), (1.0,))


@pytest.mark.parametrize("by", ["bucket", "tag"])
def test_groups_are_measured_alone(cache: LatentCache, by: str) -> None:
    *_, (_, report) = measure_latents(cache, by)  # type: ignore[arg-type]
    latents = every_latent(cache)
    tags = cache.index.tag_lists(np.arange(len(cache)))
    sides = [tuple(cache.buckets[b].tolist()) for b in cache.index.bucket]
    assert len(report.groups) > 1
    for name, moments in report.groups.items():
        belongs = [name in tags[i] if by == "tag" else f"{sides[i][0]}x{sides[i][1]}" == name for i in range(len(tags))]
        own = np.concatenate([latent for latent, mine in zip(latents, belongs, strict=True) if mine], axis=1)
        assert moments.pictures == sum(belongs) and moments.numbers == own.shape[1]
        np.testing.assert_allclose(moments.mean, own.mean(axis=1), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(moments.std, own.std(axis=1), rtol=1e-8)


def test_the_command_prints_toml_that_training_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: LatentCache
) -> None:
    from sumizome.train.config import TrainConfig

    assert main(["latents", "stats", str(cache.root), "--by", "tag", "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert "# by tag:" in text and "novelai_v3" in text and "more (--top)" in text
    stats, run = tmp_path / "stats.toml", tmp_path / "run.toml"
    stats.write_text(text)
    run.write_text('model = "m"\nlatents = "l"\nrun_dir = "r"\n')
    config = parse(TrainConfig, [str(run), str(stats)], prog="train", description=None)
    *_, (_, report) = measure_latents(cache)
    assert config.latent_statistics.mean == tuple(round(value, 4) for value in report.whole.mean)
    assert config.latent_statistics.std == tuple(round(value, 4) for value in report.whole.std)
    run.write_text(run.read_text() + '[latent_statistics]\npreset = "novelai_v3"\n')
    preset = stated_statistics(read_toml(run, TrainConfig).latent_statistics)
    assert preset == ((4.8119, 0.1607, 1.3538, -1.7753), (9.9181, 6.2753, 7.5978, 5.9956))  # report, appendix B


def test_presets_have_four_channels_and_a_source() -> None:
    for preset in LATENT_PRESETS.values():
        assert len(preset.mean) == len(preset.std) == 4 and preset.source
    assert stated_statistics(LatentStatisticsConfig()) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "sdxl", "mean": (0.0,) * 4, "std": (1.0,) * 4}, "not both"),
        ({"mean": (0.0,) * 4}, "belong together"),
        ({"mean": (0.0,) * 4, "std": (1.0,) * 3}, "a finite number for each"),
        ({"mean": (0.0,) * 4, "std": (1.0, 1.0, 0.0, 1.0)}, "above 0"),
        ({"mean": (float("nan"),) * 4, "std": (1.0,) * 4}, "finite"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LatentStatisticsConfig(**settings)  # type: ignore[arg-type]


def test_damaged_latents_are_named_not_measured(tiny_latents: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(tiny_latents, tmp_path / "latents"))
    shard = next(copy.glob("units/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 64
    shard.write_bytes(bytes(content))
    with pytest.raises(ShardError, match="damaged"):
        list(measure_latents(open_latents(copy, verify="size")))
