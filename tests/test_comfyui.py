"""An export opened by ComfyUI itself, where SUMIZOME_COMFYUI names a checkout whose requirements are installed.

    git clone https://github.com/comfyanonymous/ComfyUI && pip install -r ComfyUI/requirements.txt
    SUMIZOME_COMFYUI=$PWD/ComfyUI python -m pytest tests/test_comfyui.py

It runs in a process of its own, on the CPU; nothing of ComfyUI is imported here. The file has SDXL's real names and
shapes over a hole in the disk, and the marks that an export of ours carries: ComfyUI knows SDXL by its full size alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model_files import full_size_shapes, write_sparse
from safetensors import safe_open

CHECKOUT = os.environ.get("SUMIZOME_COMFYUI")

pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="SUMIZOME_COMFYUI names no ComfyUI checkout: the export was not opened by ComfyUI"
)

_OPEN = """
import json, sys
path, sys.argv = sys.argv[1], ["comfyui", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.model_base, comfy.model_detection, comfy.utils
held = comfy.utils.load_torch_file(path)
state = {name: tensor.to("meta") if tensor.numel() > 10_000 else tensor for name, tensor in held.items()}
prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
if not any(name.startswith(prefix) for name in state):
    prefix = ""
config = comfy.model_detection.model_config_from_unet(state, prefix)
kind = config.model_type(state, prefix)
sampling = comfy.model_base.model_sampling(config, kind)
config.set_inference_dtype(torch.float16, None)
unet = comfy.model_base.SDXL(config, kind, device="meta").diffusion_model.state_dict()
encoders = config.process_clip_state_dict(dict(state)) if prefix else {}
found = {
    "config": type(config).__name__,
    "kind": kind.name,
    "sigmas": sampling.sigmas.tolist(),
    "sigma_max": float(sampling.sigma_max),
    "timesteps": [int(sampling.timestep(torch.tensor(sigma))) for sigma in (20000.0, 4518.76, 1000.0, 200.0, 56.0)],
    "unet": {prefix + name: list(tensor.shape) for name, tensor in unet.items()},
    "clip": sorted({name.split(".")[0] for name in encoders}),
    "c_out": float(sampling.calculate_denoised(torch.tensor([3.0]), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))),
}
print("FOUND" + json.dumps(found))
"""


def opened(path: Path) -> dict[str, Any]:
    """What ComfyUI makes of the file."""
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(path)], cwd=CHECKOUT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.split("FOUND")[1])
    return found


@pytest.fixture(scope="module")
def export(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's own shapes with the marks, the table and the metadata of an export."""
    with safe_open(tiny_file, "np") as written:
        marks = [name for name in written.keys() if written.get_slice(name).get_shape() == [0]]  # noqa: SIM118
        table, metadata = written.get_tensor("alphas_cumprod"), written.metadata()
    shapes = full_size_shapes() | {"alphas_cumprod": table.shape}
    path = tmp_path_factory.mktemp("comfyui") / "model.safetensors"
    write_sparse(path, shapes, dtype="F32", marks=tuple(marks), metadata=metadata)
    with path.open("r+b") as file:
        file.seek(-table.nbytes, 2)
        file.write(table.tobytes())
    return path


def assert_velocity_to_pure_noise(found: dict[str, Any]) -> None:
    assert (found["config"], found["kind"]) == ("SDXL", "V_PREDICTION")
    assert found["sigma_max"] == pytest.approx(4518.7637, rel=1e-5)
    golden = [113.9, 120.5, 127.88, 136.17, 145.58, 156.33, 168.74, 183.22, 200.33, 220.86, 245.95, 277.33,
              317.67, 371.45, 446.76, 559.72, 748.00, 1124.55, 2254.24]  # fmt: skip
    assert found["sigmas"][980:999] == pytest.approx(golden, rel=3e-4)
    assert found["timesteps"] == [999, 999, 997, 988, 962]
    assert found["c_out"] == pytest.approx(-3 / 10**0.5)


def test_a_whole_file_is_v_prediction_to_pure_noise_and_every_tensor_has_its_place(export: Path) -> None:
    found = opened(export)
    assert_velocity_to_pure_noise(found)
    unet = {name: shape for name, shape in full_size_shapes().items() if name.startswith("model.diffusion_model.")}
    assert {name: tuple(shape) for name, shape in found["unet"].items()} == unet
    assert found["clip"] == ["clip_g", "clip_l"]


def test_a_unet_alone_with_its_marks_beside_it(tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    own = {name.removeprefix(prefix): s for name, s in full_size_shapes().items() if name.startswith(prefix)}
    found = opened(write_sparse(tmp_path / "unet.safetensors", own, marks=("v_pred", "ztsnr")))
    assert_velocity_to_pure_noise(found)
    assert {name: tuple(shape) for name, shape in found["unet"].items()} == own


def test_a_file_without_marks_is_epsilon(tmp_path: Path) -> None:
    found = opened(write_sparse(tmp_path / "bare.safetensors", full_size_shapes()))
    assert found["kind"] == "EPS" and found["sigma_max"] == pytest.approx(14.6146, rel=1e-4)
