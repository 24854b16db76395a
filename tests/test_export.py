"""Exports opened by diffusers itself: same weights, same embeddings, same pictures; and no half-written file ever."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from sumizome import export
from sumizome.diffusion.denoiser import Denoiser
from sumizome.diffusion.guidance import GuidanceConfig, build_guided_denoiser
from sumizome.diffusion.samplers import euler
from sumizome.diffusion.schedule import ScheduleConfig, build_noise_schedule
from sumizome.errors import ExportError
from sumizome.export import ModelCard, write_diffusers_folder, write_single_file
from sumizome.models import tensor_writer
from sumizome.models.architecture import clip_config, unet_config, vae_config
from sumizome.models.conditioning import UNetConditioning, apply_unet, canvas_time_ids
from sumizome.models.networks import build_network
from sumizome.models.sdxl import SDXLModel, load_model, model_digest
from sumizome.models.text_encoding import encode_prompts, tokenize
from sumizome.models.tiny import build_tiny_model
from sumizome.models.vae import decode_latents, latent_statistics

# diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 dislikes.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore:__array:DeprecationWarning")

CANVAS = (64, 48)
PROMPTS = ["1girl, blue hair, night sky"]


@pytest.fixture(scope="module")
def file(vivid: SDXLModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(vivid, tmp_path_factory.mktemp("export") / "model.safetensors")


def _conditioning(model: SDXLModel, prompts: list[str]) -> UNetConditioning:
    embeds, pooled = encode_prompts(model.text_encoders, tokenize(prompts).input_ids)
    return UNetConditioning(embeds, pooled, canvas_time_ids(CANVAS, len(prompts)))


# --- the folder, in diffusers ----------------------------------------------------------------------------------------


def test_diffusers_holds_the_same_weights(vivid: SDXLModel, vivid_pipeline: StableDiffusionXLPipeline) -> None:
    for name, network in vivid.networks.items():
        assert model_digest(getattr(vivid_pipeline, name)) == model_digest(network)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["", "a photo of a cat", "1girl, hatsune miku (vocaloid), :d, Blue_Hair, 100%"])
def test_a_short_prompt_is_encoded_as_diffusers_does(
    vivid: SDXLModel, vivid_pipeline: StableDiffusionXLPipeline, prompt: str
) -> None:
    expected, _, expected_pooled, _ = vivid_pipeline.encode_prompt(
        prompt, device="cpu", do_classifier_free_guidance=False
    )
    embeds, pooled = encode_prompts(vivid.text_encoders, tokenize([prompt]).input_ids)
    torch.testing.assert_close(embeds, expected)
    torch.testing.assert_close(pooled, expected_pooled)


def test_the_exported_tokenizers_pad_as_sdxls_do(vivid_pipeline: StableDiffusionXLPipeline) -> None:
    expected = tokenize(PROMPTS).input_ids[:, 0, 0].tolist()
    for tokenizer, ids in zip((vivid_pipeline.tokenizer, vivid_pipeline.tokenizer_2), expected, strict=True):
        assert tokenizer(PROMPTS[0], padding="max_length", max_length=77).input_ids == ids


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 10])
def test_diffusers_draws_the_same_picture(
    vivid: SDXLModel, vivid_pipeline: StableDiffusionXLPipeline, steps: int
) -> None:
    """From the same noise, at the same sigmas, guided: the whole path of both programs. Tolerance: 5e-4 of [0, 1]."""
    noise = torch.randn(1, 4, CANVAS[0] // 4, CANVAS[1] // 4, generator=torch.Generator().manual_seed(0))
    asked = {"height": CANVAS[0], "width": CANVAS[1], "num_inference_steps": steps, "guidance_scale": 4.0}
    theirs = partial(vivid_pipeline, PROMPTS[0], negative_prompt="", latents=noise.clone(), **asked)
    their_latents = theirs(output_type="latent").images
    their_pixels = theirs(output_type="pt").images

    sigmas = vivid_pipeline.scheduler.sigmas.double()
    assert float(sigmas[0]) == pytest.approx(4096, rel=1e-6) and vivid_pipeline.scheduler.timesteps[0] == 999
    schedule = build_noise_schedule(vivid.schedule_config)

    def denoiser(prompts: list[str]) -> Denoiser:
        conditioning = _conditioning(vivid, prompts)
        return Denoiser(schedule, "v_prediction", lambda x, t: apply_unet(vivid.unet, x, t, conditioning))

    guided = build_guided_denoiser(GuidanceConfig(4.0), denoiser(PROMPTS), denoiser([*PROMPTS, ""]))
    *_, last = euler(guided, noise * float(sigmas[0]), sigmas)
    scale = their_latents.abs().max()
    assert scale > 0.5
    assert (last.x - their_latents).abs().max() < 2e-4 * scale
    pixels = (decode_latents(vivid.vae, last.x) + 1) / 2
    assert (pixels - their_pixels).abs().max() < 5e-4


def test_schedulers_that_know_the_flag_have_our_sigmas_and_the_others_reach_pure_noise(vivid_folder: Path) -> None:
    expected = build_noise_schedule(ScheduleConfig()).sigmas
    for kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"):
        scheduler = getattr(diffusers, kind).from_pretrained(vivid_folder, subfolder="scheduler")
        sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double()
        torch.testing.assert_close(sigmas[:-1], expected[:-1], rtol=2e-4, atol=0)
        assert float(sigmas[-1]) == pytest.approx(4096, rel=1e-6)
        scheduler.set_timesteps(28)
        assert scheduler.timesteps[0] == 999
    for kind in ("HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler"):
        scheduler = getattr(diffusers, kind).from_pretrained(vivid_folder, subfolder="scheduler")
        sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double()
        assert float(sigmas[-1]) == pytest.approx(4096, rel=1e-3)
        assert bool((sigmas.diff() > 0).all())
        torch.testing.assert_close(sigmas[:963], expected[:963], rtol=0.015, atol=0)


# --- the single file -------------------------------------------------------------------------------------------------


def test_diffusers_reads_the_single_file_bit_for_bit(vivid: SDXLModel, file: Path, vivid_folder: Path) -> None:
    unet = UNet2DConditionModel.from_single_file(
        file, config=str(vivid_folder), subfolder="unet", local_files_only=True
    )
    assert model_digest(unet) == model_digest(vivid.unet)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_both_layouts_read_back_bit_for_bit(
    vivid: SDXLModel, vivid_folder: Path, file: Path, tmp_path: Path, dtype: export.ExportDtype
) -> None:
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    if dtype != "fp32":
        vivid_folder = write_diffusers_folder(vivid, tmp_path / "folder", dtype=dtype)
        file = write_single_file(vivid, tmp_path / "file.safetensors", dtype=dtype)
    for loaded in (load_model(vivid_folder, dtype=torch_dtype), load_model(file, dtype=torch_dtype)):
        for name, network in vivid.networks.items():
            expected = network.state_dict()
            for key, tensor in loaded.networks[name].state_dict().items():
                assert torch.equal(tensor, expected[key].to(torch_dtype).to(tensor.dtype)), key


def test_the_file_is_marked_for_every_program(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        for marker in ("v_pred", "ztsnr"):
            assert opened.get_tensor(marker).shape == (0,) and opened.get_tensor(marker).dtype == torch.float32
        table = opened.get_tensor("alphas_cumprod")
        assert not {"edm_mean", "edm_std", "edm_vpred.sigma_max"} & set(opened.keys())
    assert table.shape == (1000,) and float(table[-1]) == pytest.approx(4.8973451890853435e-08)
    sigmas = ((1 - table.double()) / table.double()).sqrt()
    for timestep, sigma in {0: 0.0291672, 962: 56.1782, 980: 113.9, 990: 245.95, 998: 2254.24, 999: 4518.7637}.items():
        assert float(sigmas[timestep]) == pytest.approx(sigma, rel=1e-3), timestep
    assert metadata["modelspec.prediction_type"] == "v-zsnr" and metadata["prediction_type"] == "v"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1" and metadata["format"] == "pt"


def test_the_hash_in_the_metadata_is_that_of_the_data(file: Path) -> None:
    content = file.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"


def test_the_card_is_in_the_metadata(vivid: SDXLModel, tmp_path: Path) -> None:
    card = ModelCard(title="Ink", author="me", description="tags", resolution=(1216, 832))
    with safe_open(write_single_file(vivid, tmp_path / "ink.safetensors", card=card), "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.title"] == "Ink" and metadata["modelspec.author"] == "me"
    assert metadata["modelspec.resolution"] == "832x1216"  # ModelSpec writes width first


def test_an_epsilon_model_carries_no_marks(vivid: SDXLModel, tmp_path: Path) -> None:
    epsilon = replace(vivid, prediction_type="epsilon", schedule_config=ScheduleConfig(zero_terminal_snr=False))
    file = write_single_file(epsilon, tmp_path / "epsilon.safetensors")
    with safe_open(file, "pt") as opened:
        assert not {"v_pred", "ztsnr", "alphas_cumprod"} & set(opened.keys())
        assert opened.metadata()["modelspec.prediction_type"] == "epsilon"
    folder = write_diffusers_folder(epsilon, tmp_path / "epsilon")
    for path in (file, folder):
        loaded = load_model(path, components=())
        assert loaded.prediction_type == "epsilon" and not loaded.schedule_config.zero_terminal_snr


def test_the_sidecar_is_for_full_size_velocity_models_and_says_v_scaling(vivid: SDXLModel, file: Path) -> None:
    assert not file.with_suffix(".yaml").exists()  # A1111 cannot open a tiny model
    text = (Path(export.__file__).parent / "models" / "assets" / "a1111_sdxl_v.yaml").read_text()
    params = yaml.safe_load(text)["model"]["params"]
    assert params["denoiser_config"]["params"]["scaling_config"]["target"].endswith(".VScaling")
    assert "parameterization" not in params
    assert params["network_config"]["params"]["adm_in_channels"] == 2816
    assert len(params["conditioner_config"]["params"]["emb_models"]) == 5


@torch.no_grad()
def test_per_channel_statistics_are_folded_because_the_layout_cannot_hold_them(tmp_path: Path) -> None:
    model = build_tiny_model(seed=4)
    model.vae.register_to_config(latents_mean=[4.8, 0.2, 1.4, -1.8], latents_std=[9.9, 6.3, 7.6, 6.0], scaling_factor=1)
    loaded = load_model(write_single_file(model, tmp_path / "model.safetensors"))
    assert latent_statistics(loaded.vae).mean == (0.0,) * 4
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        decode_latents(loaded.vae, latents), decode_latents(model.vae, latents), atol=1e-5, rtol=0
    )
    assert model.vae.config["latents_mean"] == [4.8, 0.2, 1.4, -1.8]  # the caller's model is left as it was


# --- what can go wrong -----------------------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir())


def test_nothing_is_overwritten_unasked(vivid: SDXLModel, vivid_folder: Path, file: Path) -> None:
    with pytest.raises(ExportError, match="exists"):
        write_single_file(vivid, file)
    with pytest.raises(ExportError, match="exists"):
        write_diffusers_folder(vivid, vivid_folder)


def test_asked_to_overwrite_it_replaces_a_model_and_nothing_else(vivid: SDXLModel, tmp_path: Path) -> None:
    first = build_tiny_model(seed=9)
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    write_diffusers_folder(first, folder)
    write_single_file(first, file)
    write_diffusers_folder(vivid, folder, overwrite=True)
    write_single_file(vivid, file, overwrite=True)
    for path in (folder, file):
        assert model_digest(load_model(path).unet) == model_digest(vivid.unet)
    assert sorted(_files(tmp_path)) == ["file.safetensors", "folder"]

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "cat.png").write_bytes(b"precious")
    with pytest.raises(ExportError, match="holds no diffusers model"):
        write_diffusers_folder(vivid, pictures, overwrite=True)
    assert (pictures / "cat.png").read_bytes() == b"precious"


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_weight_too_large_for_fp16_is_named_and_nothing_is_left(tmp_path: Path, layout: str) -> None:
    model = build_tiny_model(seed=5)
    with torch.no_grad():
        model.unet.conv_in.bias[0] = 70000.0
    with pytest.raises(ExportError, match=r"unet\.conv_in\.bias reaches 7e\+04, which overflows fp16"):
        _write(layout, model, tmp_path, "fp16")
    assert list(tmp_path.iterdir()) == []
    _write(layout, model, tmp_path, "bf16")
    with torch.no_grad():
        model.unet.conv_in.bias[0] = float("nan")
    with pytest.raises(ExportError, match="NaN"):
        _write(layout, model, tmp_path / "again", "fp32")


def _write(layout: str, model: SDXLModel, where: Path, dtype: export.ExportDtype) -> Path:
    if layout == "folder":
        return write_diffusers_folder(model, where / "model", dtype=dtype)
    return write_single_file(model, where / "model.safetensors", dtype=dtype)


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_flipped_bit_on_disk_is_found_and_the_old_export_stays(
    vivid: SDXLModel, tmp_path: Path, layout: str, break_disk: Callable[[], None]
) -> None:
    path = _write(layout, build_tiny_model(seed=6), tmp_path, "fp32")
    before = sorted((str(p), p.stat().st_size) for p in tmp_path.rglob("*"))
    break_disk()
    with pytest.raises(ExportError, match="bit for bit"):
        if layout == "folder":
            write_diffusers_folder(vivid, path, overwrite=True)
        else:
            write_single_file(vivid, path, overwrite=True)
    assert sorted((str(p), p.stat().st_size) for p in tmp_path.rglob("*")) == before
    assert load_model(path).prediction_type == "v_prediction"


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_full_disk_is_an_export_error_and_leaves_nothing(
    vivid: SDXLModel, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(target: Path, *rest: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_writer, "_verify", full)
    with pytest.raises(ExportError, match="No space left"):
        _write(layout, vivid, tmp_path, "fp32")
    assert list(tmp_path.iterdir()) == []


def test_what_the_layouts_cannot_say_is_refused(vivid: SDXLModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    refused = {
        "sample": replace(vivid, prediction_type="sample", schedule_config=ScheduleConfig(zero_terminal_snr=False)),
        "ztsnr needs v_pred": replace(vivid, prediction_type="epsilon"),
        "betas": replace(vivid, schedule_config=ScheduleConfig(beta_end=0.02)),
        "vae was not loaded": replace(vivid, networks={name: n for name, n in vivid.networks.items() if name != "vae"}),
    }
    for message, wrong in refused.items():
        with pytest.raises(ExportError, match=message):
            write_single_file(wrong, path)
    with pytest.raises(ExportError, match=r"\.safetensors"):
        write_single_file(vivid, tmp_path / "model.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_read_by_others_as_the_umask_says(file: Path, vivid_folder: Path) -> None:
    ordinary = (vivid_folder / "model_index.json").stat().st_mode
    assert file.stat().st_mode == ordinary
    assert (vivid_folder / "unet/diffusion_pytorch_model.safetensors").stat().st_mode == ordinary


def test_configs_in_the_folder_are_plain(vivid_folder: Path) -> None:
    text = json.loads((vivid_folder / "text_encoder_2/config.json").read_text())
    assert text["hidden_size"] == 96 and text["architectures"] == ["CLIPTextModelWithProjection"]
    scheduler = json.loads((vivid_folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["timestep_spacing"] == "trailing" and len(scheduler["trained_betas"]) == 1000
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"] is True
    names = {tensor for part in ("text_encoder",) for tensor in load_file(vivid_folder / part / "model.safetensors")}
    assert all(name.startswith("text_model.") for name in names)  # transformers 4 needs it, 5 takes it


# --- at SDXL's real size ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_size_model_goes_through_a_single_file(tmp_path: Path) -> None:
    """Random bfloat16 weights; about 8 GB of memory and 7 GB of disk."""
    configs = {
        "unet": unet_config(),
        "vae": vae_config(),
        "text_encoder": clip_config(),
        "text_encoder_2": clip_config(width=1280, layers=32, intermediate=5120, activation="gelu", projection_dim=1280),
    }
    networks = {name: build_network(name, config, "meta").bfloat16() for name, config in configs.items()}
    draw = torch.Generator().manual_seed(0)
    for network in networks.values():
        network.to_empty(device="cpu")
        for tensor in network.state_dict().values():
            tensor.uniform_(-0.05, 0.05, generator=draw)
    model = SDXLModel(networks, "v_prediction", ScheduleConfig(), source=None)
    digests = {name: model_digest(network) for name, network in networks.items()}

    path = write_single_file(model, tmp_path / "full.safetensors", dtype="bf16")
    del networks, model
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
        unet = [name for name in opened.keys() if name.startswith("model.diffusion_model.")]  # noqa: SIM118
    assert len(unet) == 1680 and path.with_suffix(".yaml").is_file()
    for component in ("unet", "text_encoders"):
        for name, network in load_model(path, dtype=torch.bfloat16, components=(component,)).networks.items():
            assert model_digest(network) == digests[name]
