"""One tiny model for the whole room, in memory, as a folder and as a single file: all are only read."""

from pathlib import Path

import pytest

from sumizome.export import write_diffusers_folder, write_single_file
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tiny import build_tiny_model


@pytest.fixture(scope="session")
def tiny() -> SDXLModel:
    return build_tiny_model(seed=0)


@pytest.fixture(scope="session")
def tiny_folder(tiny: SDXLModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_diffusers_folder(tiny, tmp_path_factory.mktemp("folder") / "tiny")


@pytest.fixture(scope="session")
def tiny_file(tiny: SDXLModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tiny, tmp_path_factory.mktemp("file") / "tiny.safetensors")
