"""Training from latents on S3 is training from the folder they were copied from, to the bit."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from short_runs import short_run

from sumizome.data.store import open_store
from sumizome.errors import ConfigError
from sumizome.settings import as_mapping, parse
from sumizome.train.build import build_trainer
from sumizome.train.config import TrainConfig
from sumizome.train.run_dir import hold_run_dir


def _losses(config: TrainConfig) -> list[float]:
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        with closing(trainer.steps()) as steps:
            return [report.loss for report in steps]


@pytest.mark.parametrize("cache_size", [0.0, 1.0])
def test_training_from_s3_is_training_from_the_folder(
    tiny_folder: Path, tiny_latents: Path, tmp_path: Path, s3_bucket: str, cache_size: float
) -> None:
    store = open_store(f"{s3_bucket}/latents")
    for name in open_store(tiny_latents).list():
        store.put_file(tiny_latents / name, name)
    config = short_run(tiny_folder, tiny_latents, tmp_path / "folder", steps=2, micro_batches_per_step=1)
    there = replace(
        config,
        latents=Path(store.address),
        run_dir=tmp_path / "s3",
        cache_dir=tmp_path / "cache",
        cache_size=cache_size,
    )
    assert _losses(there) == _losses(config)
    assert bool(list((tmp_path / "cache").glob("shards/*.safetensors"))) == bool(cache_size)


def test_the_settings_are_flags_and_toml(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('model = "m"\nlatents = "s3://bucket/set"\nrun_dir = "r"\ncache_size = 250.0\n')
    config = parse(TrainConfig, [str(tmp_path / "run.toml"), "--cache-dir", "/fast"], prog="train", description=None)
    assert (config.cache_dir, config.cache_size) == (Path("/fast"), 250.0)
    assert open_store(config.latents).address == "s3://bucket/set"
    assert open_store(as_mapping(config)["latents"]).address == "s3://bucket/set", "as the run's record has it"
    with pytest.raises(ConfigError, match="cache_size"):
        replace(config, cache_size=-1.0)
