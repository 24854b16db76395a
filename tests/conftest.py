"""Every test runs with shapes and dtypes checked: jaxtyping reads the signatures, beartype enforces them.

The session's fixtures are one tiny model and one small prepared dataset; tests only read them.
"""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from botocore.session import get_session as boto_session
from hypothesis import settings
from jaxtyping import install_import_hook
from PIL import Image
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server, serve_s3

# Before torch is imported: spinning OpenMP barriers make a step many times slower when tests share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

install_import_hook("sumizome", "beartype.beartype")

# A busy machine is not a failure: no time limit on an example.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from sumizome.models.sdxl import SDXLModel


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on loopback; each test makes a bucket of its own."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3://… of a new bucket of the server, with the environment that reaches it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(variable, raising=False)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    # Not a folder made behind the server's back, which it may not see at once.
    boto = boto_session().create_client("s3")
    boto.create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def tiny() -> "SDXLModel":
    """The tiny model in memory, untrained."""
    from sumizome.models.tiny import build_tiny_model

    return build_tiny_model(seed=0)


@pytest.fixture(scope="session")
def tiny_folder(tiny: "SDXLModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a diffusers folder."""
    from sumizome.export import write_diffusers_folder

    return write_diffusers_folder(tiny, tmp_path_factory.mktemp("folder") / "tiny")


@pytest.fixture(scope="session")
def tiny_file(tiny: "SDXLModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a single file."""
    from sumizome.export import write_single_file

    return write_single_file(tiny, tmp_path_factory.mktemp("file") / "tiny.safetensors")


@pytest.fixture(scope="session")
def vivid() -> "SDXLModel":
    """A tiny model whose answers are as large as a trained one's, so that every input shows in a picture."""
    import torch

    from sumizome.models.tiny import build_tiny_model

    model = build_tiny_model(seed=3)
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(8)
    return model


@pytest.fixture(scope="session")
def vivid_folder(vivid: "SDXLModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sumizome.export import write_diffusers_folder

    return write_diffusers_folder(vivid, tmp_path_factory.mktemp("vivid") / "folder")


@pytest.fixture(scope="module")
def vivid_pipeline(vivid_folder: Path) -> "StableDiffusionXLPipeline":
    """diffusers' own; tests change its scheduler."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(vivid_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def break_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, a bit of every safetensors file flips between its writing and its reading back."""
    from sumizome.models import tensor_writer

    def faulty(path: Path, *rest: Any) -> None:
        with path.open("r+b") as file:
            file.seek(-1000, 2)
            byte = file.read(1)[0]
            file.seek(-1000, 2)
            file.write(bytes([byte ^ 1]))
        verify(path, *rest)

    verify = tensor_writer._verify
    return lambda: monkeypatch.setattr(tensor_writer, "_verify", faulty)


@pytest.fixture(scope="session")
def tagged_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty tagged pictures of flat and gradient colours in three shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for index, (height, width) in enumerate([(32, 32), (24, 44), (44, 24), (40, 40)] * 10):
        colours = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(f"picture, shape {index % 4}, hue {colours[0, 0, 0] // 32}")
    return folder


@pytest.fixture(scope="session")
def tiny_latents(tagged_folder: Path, tiny: "SDXLModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tagged folder as latents of the tiny model's VAE, buckets of 32² px area."""
    from sumizome.data.buckets import BucketConfig
    from sumizome.data.ingest import ingest
    from sumizome.prepare import PrepareConfig, prepare_latents

    out = tmp_path_factory.mktemp("latents") / "latents"
    manifest = ingest([tagged_folder], workers=0).manifest
    for _ in prepare_latents(manifest, tiny.vae, out, PrepareConfig(BucketConfig(area=32, step=16))):
        pass
    return out
