"""A kept set of tiny files, one of each origin that people have, each with what must be made of it.

The files are made by code, from one tiny model, in the form in which each program writes its own: names, marks,
metadata, dtypes, what is left out. A row says what `inspect` finds, and the loader must come to the same.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sumizome.errors import ModelError
from sumizome.inspection import inspect_model
from sumizome.models.sdxl import Component, SDXLModel, load_model

MARKS = ("v_pred", "ztsnr", "alphas_cumprod")
VAE, UNET, ENCODERS = "first_stage_model.", "model.diffusion_model.", "conditioner."
EMPTY = {name: torch.tensor([]) for name in MARKS[:2]}
Make = Callable[["Origins"], Path]


class Origins:
    """The one model as a file's tensors and as a folder, and a place to write."""

    def __init__(self, file: Path, folder: Path, out: Path) -> None:
        self.tensors = {name: tensor for name, tensor in load_file(file).items() if name not in MARKS}
        self._folder, self.out = folder, out

    def file(self, tensors: dict[str, Tensor], name: str = "model", **metadata: str) -> Path:
        path = self.out / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata or None)
        return path

    def folder(self) -> Path:
        return Path(shutil.copytree(self._folder, self.out / "folder"))


def half(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def dotted(**metadata: str) -> dict[str, str]:
    """ModelSpec's keys from Python's names."""
    return {key.replace("modelspec_", "modelspec."): value for key, value in metadata.items()}


# --- original single files -------------------------------------------------------------------------------------------


def sdxl_base(origins: Origins) -> Path:
    """Stability's base: ModelSpec without a prediction type, two leftovers of training, half precision."""
    extras = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6).half(),
    }
    spec = dotted(modelspec_architecture="stable-diffusion-xl-v1-base", modelspec_sai_model_spec="1.0.0")
    return origins.file(half(origins.tensors) | extras, **spec)


def fine_tune_without_a_word(origins: Origins) -> Path:
    return origins.file(half(origins.tensors))


def kohya_epsilon(origins: Origins) -> Path:
    spec = dotted(modelspec_prediction_type="epsilon", modelspec_implementation="sgm", ss_v2="False")
    return origins.file(half(origins.tensors), **spec)


def kohya_v(origins: Origins) -> Path:
    """kohya's sd-scripts: no marks; ModelSpec says v, its own keys say the schedule."""
    return origins.file(
        half(origins.tensors), **dotted(modelspec_prediction_type="v", ss_zero_terminal_snr="True", ss_steps="9000")
    )


def comfyui_v(origins: Origins) -> Path:
    """ComfyUI's CheckpointSave: both marks, `predict_key`, the workflow, encoders with logit_scale."""
    extras = {"conditioner.embedders.1.model.logit_scale": torch.tensor(4.6).half()}
    metadata = dotted(modelspec_predict_key="v", prompt=json.dumps({"1": {}}))
    return origins.file(half(origins.tensors) | extras | EMPTY, **metadata)


def comfyui_old_merge(origins: Origins) -> Path:
    """ComfyUI before 2025-04: a merge kept `v_pred` and lost `ztsnr`."""
    return origins.file(half(origins.tensors) | {"v_pred": EMPTY["v_pred"]}, **dotted(modelspec_predict_key="v"))


def comfyui_key_alone(origins: Origins) -> Path:
    return origins.file(half(origins.tensors), **dotted(modelspec_predict_key="v"))


def noobai_v(origins: Origins) -> Path:
    """NoobAI's v-prediction release: both marks, and ModelSpec's plain "v"."""
    spec = dotted(modelspec_prediction_type="v", modelspec_title="NoobAI-like", modelspec_sai_model_spec="1.0.0")
    return origins.file(half(origins.tensors) | EMPTY, name="noob-vPred", **spec)


def a1111_v(origins: Origins) -> Path:
    """What was shared for A1111: a bare file and a .yaml with VScaling."""
    path = origins.file(half(origins.tensors))
    path.with_suffix(".yaml").write_text("model:\n  params:\n    scaling: sgm.modules.denoiser_scaling.VScaling\n")
    return path


def novelai_v3(origins: Origins) -> Path:
    """NovelAI v3-like: v-prediction on pure noise, fp32, and not a word of it in the file but its name."""
    return origins.file(origins.tensors, name="nai-v3-vpred")


def novelai_v3_marked(origins: Origins) -> Path:
    """The same with marks and the rescaled table, as converters hand it on."""
    table = torch.linspace(0.999, 0.01, 1000).clone()
    table[-1] = 4.8973451890853435e-08
    return origins.file(origins.tensors | EMPTY | {"alphas_cumprod": table})


def with_averaged_unet(origins: Origins) -> Path:
    averaged = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensor.half() for name, tensor in
                origins.tensors.items() if name.startswith(UNET)}  # fmt: skip
    return origins.file(half(origins.tensors) | averaged)


def bfloat_with_old_vae(origins: Origins) -> Path:
    """bf16 weights, and a VAE of before 1×1 convolutions: linear attention."""
    old = {
        name: tensor[:, :, 0, 0] if ".attn_1." in name and tensor.ndim == 4 else tensor
        for name, tensor in half(origins.tensors, torch.bfloat16).items()
    }
    return origins.file(old | EMPTY)


def without_vae(origins: Origins) -> Path:
    return origins.file({name: t for name, t in half(origins.tensors).items() if not name.startswith(VAE)} | EMPTY)


def without_encoders(origins: Origins) -> Path:
    return origins.file({name: t for name, t in half(origins.tensors).items() if not name.startswith(ENCODERS)} | EMPTY)


def unet_alone(origins: Origins) -> Path:
    own = {name.removeprefix(UNET): t for name, t in half(origins.tensors).items() if name.startswith(UNET)}
    return origins.file(own | EMPTY)


def unet_alone_with_tables(origins: Origins) -> Path:
    """As a training module saves itself: U-Net and schedule side by side, both without a prefix."""
    own = {name.removeprefix(UNET): t for name, t in half(origins.tensors).items() if name.startswith(UNET)}
    table = torch.linspace(0.999, 0.0, 1000).clamp(min=4.8973451890853435e-08)
    tables = ("betas", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod", "posterior_variance")
    return origins.file(own | EMPTY | {"alphas_cumprod": table} | {name: table.clone() for name in tables})


def file_of_transformers_5(origins: Origins) -> Path:
    """Written from an encoder's own state, whose names have no "text_model." since transformers 5."""
    prefix = "conditioner.embedders.0.transformer."
    shortened = {name.replace(f"{prefix}text_model.", prefix): t for name, t in half(origins.tensors).items()}
    assert len(shortened.keys() - origins.tensors.keys()) == 36
    extras = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}
    return origins.file(shortened | extras | EMPTY)


def edm(origins: Origins) -> Path:
    return origins.file(half(origins.tensors) | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)})


# --- diffusers folders -----------------------------------------------------------------------------------------------


def scheduler(folder: Path, *, drop: tuple[str, ...] = (), **changes: object) -> Path:
    path = folder / "scheduler/scheduler_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(config | changes))
    return folder


def folder_fp32(origins: Origins) -> Path:
    return origins.folder()


def folder_half(dtype: torch.dtype) -> Make:
    """As the hub serves a variant: only `*.fp16.safetensors`, whatever the dtype inside."""

    def make(origins: Origins) -> Path:
        folder = origins.folder()
        for path in list(folder.glob("*/*.safetensors")):
            save_file(half(load_file(path), dtype), path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
            path.unlink()
        return folder

    return make


def folder_sharded(origins: Origins) -> Path:
    folder = origins.folder()
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, whole.with_name(shard))
        weight_map |= dict.fromkeys(part, shard)
    whole.unlink()
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def folder_transformers_5(origins: Origins) -> Path:
    """transformers 5 writes encoders without "text_model."; our own folders have it, as transformers 4 needs."""
    folder = origins.folder()
    for path in folder.glob("text_encoder*/model.safetensors"):
        renamed = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
        assert any(name.startswith("text_model.") for name in load_file(path))
        save_file(renamed, path, metadata={"format": "pt"})
    return folder


def folder_old_vae(origins: Origins) -> Path:
    folder = origins.folder()
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    parts = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for name, tensor in load_file(path).items():
        for new, old in parts.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    save_file(tensors, path)
    return folder


def folder_of_sdxl(origins: Origins) -> Path:
    """SDXL base's own scheduler."""
    changes = {"prediction_type": "epsilon", "timestep_spacing": "leading", "rescale_betas_zero_snr": False}
    return scheduler(origins.folder(), drop=("trained_betas",), **changes)


def folder_with_flag_alone(origins: Origins) -> Path:
    return scheduler(origins.folder(), drop=("trained_betas",))


def folder_with_betas_alone(origins: Origins) -> Path:
    """Betas that end at pure noise and no flag: as some trainers write them."""
    return scheduler(origins.folder(), drop=("rescale_betas_zero_snr",))


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """A row: what the model is read as, and what is said of it."""

    make: Make
    prediction_type: str
    zero_terminal_snr: bool
    layout: str = "file"
    dtype: str = "F16"
    problems: tuple[str, ...] = ()
    """Words of each problem, in order."""
    decides: str | None = None
    lacks: tuple[Component, ...] = ()
    comfyui_is_right: bool = True


V, E = "v_prediction", "epsilon"
TABLE = {
    "SDXL base": Expected(sdxl_base, E, False, decides="nothing above"),
    "fine-tune without a word": Expected(fine_tune_without_a_word, E, False, decides="nothing above"),
    "kohya, epsilon": Expected(kohya_epsilon, E, False, decides="modelspec.prediction_type"),
    "kohya, v": Expected(kohya_v, V, True, decides="ss_zero_terminal_snr", comfyui_is_right=False),
    "ComfyUI": Expected(comfyui_v, V, True, decides="tensor ztsnr"),
    "ComfyUI, old merge": Expected(comfyui_old_merge, V, False, decides="tensor v_pred"),
    "ComfyUI, key alone": Expected(comfyui_key_alone, V, False, decides="predict_key", comfyui_is_right=False),
    "NoobAI": Expected(noobai_v, V, True, decides="tensor ztsnr"),
    "A1111 with .yaml": Expected(a1111_v, V, False, decides="model.yaml", comfyui_is_right=False),
    "NovelAI v3, bare": Expected(novelai_v3, E, False, dtype="F32", problems=("the file's name contradicts",)),
    "NovelAI v3, marked": Expected(novelai_v3_marked, V, True, dtype="F32", decides="tensor v_pred"),
    "with averaged U-Net": Expected(with_averaged_unet, E, False, problems=("averaged U-Net",)),
    "bf16, old VAE layers": Expected(bfloat_with_old_vae, V, True, dtype="BF16"),
    "without VAE": Expected(without_vae, V, True, problems=("has no vae",), lacks=("vae",)),
    "without encoders": Expected(
        without_encoders, V, True, layout="unet", problems=("has no text_encoder", "has no text_encoder_2"),
        lacks=("text_encoders",),
    ),
    "U-Net alone": Expected(unet_alone, V, True, layout="unet", lacks=("vae", "text_encoders")),
    "U-Net and schedule": Expected(unet_alone_with_tables, V, True, layout="unet", lacks=("vae", "text_encoders")),
    "transformers 5": Expected(file_of_transformers_5, V, True, problems=('lack "text_model."',)),
    "EDM": Expected(edm, "EDM", False, problems=("EDM",), lacks=("unet",), comfyui_is_right=True),
    "folder, fp32": Expected(folder_fp32, V, True, layout="folder", dtype="F32", decides="rescale_betas_zero_snr"),
    "folder, fp16": Expected(folder_half(torch.float16), V, True, layout="folder"),
    "folder, bf16": Expected(folder_half(torch.bfloat16), V, True, layout="folder", dtype="BF16"),
    "folder, sharded": Expected(folder_sharded, V, True, layout="folder", dtype="F32"),
    "folder, transformers 5": Expected(folder_transformers_5, V, True, layout="folder", dtype="F32"),
    "folder, VAE of 2023": Expected(folder_old_vae, V, True, layout="folder", dtype="F32"),
    "folder, SDXL's own": Expected(folder_of_sdxl, E, False, layout="folder", dtype="F32"),
    "folder, flag alone": Expected(folder_with_flag_alone, V, True, layout="folder", dtype="F32"),
    "folder, betas alone": Expected(
        folder_with_betas_alone, V, True, layout="folder", dtype="F32", decides="trained_betas"
    ),
}  # fmt: skip


@pytest.fixture
def origins(tiny_file: Path, tiny_folder: Path, tmp_path: Path) -> Origins:
    return Origins(tiny_file, tiny_folder, tmp_path)


@pytest.mark.parametrize("name", TABLE)
def test_each_origin_is_read_as_what_it_is(name: str, origins: Origins, tiny: SDXLModel) -> None:
    expected = TABLE[name]
    path = expected.make(origins)
    findings = inspect_model(path)
    assert (findings.prediction_type, findings.zero_terminal_snr) == (
        expected.prediction_type,
        expected.zero_terminal_snr,
    )
    assert findings.layout == expected.layout and next(iter(findings.dtypes)) == expected.dtype
    assert len(findings.problems) == len(expected.problems), findings.problems
    for words, problem in zip(expected.problems, findings.problems, strict=True):
        assert words in problem
    assert not any(part.missing or part.foreign or part.misshapen for part in findings.components)
    if expected.decides:
        deciding = [evidence.source for evidence in findings.evidence if evidence.verdict == "decides"]
        assert any(expected.decides in source for source in deciding), deciding
    comfyui = next(row for row in findings.programs if row.program == "ComfyUI")
    if expected.layout != "folder":
        assert comfyui.right == expected.comfyui_is_right

    everything: tuple[Component, ...] = ("unet", "vae", "text_encoders")
    present = tuple(component for component in everything if component not in expected.lacks)
    if "unet" in expected.lacks:
        with pytest.raises(ModelError, match="EDM"):
            load_model(path)
        return
    loaded = load_model(path, components=present)
    assert (loaded.prediction_type, loaded.schedule_config.zero_terminal_snr) == (
        expected.prediction_type,
        expected.zero_terminal_snr,
    )
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[expected.dtype]
    for part, network in loaded.networks.items():
        for key, tensor in tiny.networks[part].state_dict().items():
            assert torch.equal(network.state_dict()[key], tensor.to(dtype).float()), (part, key)
    for component in expected.lacks:
        with pytest.raises(ModelError, match="has no"):
            load_model(path, components=(component,))


def test_betas_of_another_schedule_are_refused(origins: Origins) -> None:
    folder = scheduler(origins.folder(), trained_betas=torch.linspace(1e-4, 0.02, 1000).tolist())
    with pytest.raises(ModelError, match="trained_betas of another schedule"):
        load_model(folder, components=())
    scheduler(folder, trained_betas=[0.1, "much"])
    with pytest.raises(ModelError, match="trained_betas is no list"):
        load_model(folder, components=())
