"""Trains the tiny model's AutoencoderKL on folders of pictures: `sumizome/models/assets/tiny_vae.safetensors`.

    python demo/train_tiny_vae.py --data DRAWN [EMOJI …] --minutes 30

Owns the start, the loss and the loop; the architecture is `sumizome.models.tiny.tiny_vae_config`. The start is not
random: the weights are set so that the network is nearly a linear patch codec (principal components of 4×4 patches),
and training improves on that. Pixels are RGB in [-1, 1], [batch, 3, height, width].
"""

import argparse
import copy
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sumizome.models
from sumizome.models.tiny import tiny_vae_config
from sumizome.models.vae import fold_latent_statistics

__all__ = ["linear_start", "main", "patch_components", "psnr"]

ASSET = Path(next(iter(sumizome.models.__path__))) / "assets" / "tiny_vae.safetensors"
BUCKETS = ((64, 64), (80, 48), (48, 80), (72, 56), (56, 72))
"""(height, width) of the training pictures: the demo's area."""
CROPS = ((0.0, 32), (0.6, 48))
"""(share of the training time, side of a crop in px): small crops see more pictures, larger ones fewer borders."""
FLAT_EVERY = 12
"""One crop in so many is a flat colour."""
LATENT_NOISE = 0.1
"""Added to the latents while the decoder learns, in units of a channel's deviation: a U-Net's latents are not exact."""
DETAIL_DEVIATION = 0.7
"""Of the fourth channel (a gradient within the patch) after normalisation, where the three colours have 1."""
AVERAGE_DECAY = 0.998
ANCHOR = 4.0
"""The constant in the anchor channels; see `linear_start`."""


# -- pictures -------------------------------------------------------------------------------------------------------


def load_pictures(folder: Path) -> list[Tensor]:
    """Every PNG of the folder as uint8 [3, height, width], fitted to the bucket with the nearest aspect."""
    return [_fitted(path) for path in sorted(folder.rglob("*.png"))]


def _fitted(path: Path) -> Tensor:
    image = Image.open(path).convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(paper, image).convert("RGB")
    aspect = math.log(image.height / image.width)
    height, width = min(BUCKETS, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - aspect))
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)


def random_crops(pictures: list[Tensor], batch: int, side: int, rng: np.random.Generator) -> Tensor:
    """A batch of crops [batch, 3, side, side], mirrored half the time, some of them flat colours."""
    pixels = torch.empty(batch, 3, side, side)
    for row, index in enumerate(rng.integers(len(pictures), size=batch)):
        picture = pictures[index]
        top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[1:])
        crop = picture[:, top : top + side, left : left + side].float() / 127.5 - 1
        pixels[row] = crop.flip(-1) if rng.random() < 0.5 else crop
    for row in range(0, batch, FLAT_EVERY):
        pixels[row] = _flat_color(rng)[:, None, None]
    return pixels


def _flat_color(rng: np.random.Generator) -> Tensor:
    """A colour anywhere in the cube, often at a corner: black, white and the pure hues must come back exactly."""
    color = torch.tensor(rng.uniform(-1, 1, 3), dtype=torch.float32)
    return color.sign() if rng.random() < 0.5 else color


# -- the start ------------------------------------------------------------------------------------------------------


def patch_components(pictures: list[Tensor], factor: int = 4) -> Tensor:
    """Principal components of the pictures' patches, [3·factor², 3, factor, factor], largest variance first.

    About zero, not about the mean patch, so that mid-grey (0 in every channel) has zero latents.
    """
    patches = [
        nn.functional.unfold(picture[None].float() / 127.5 - 1, factor, stride=factor)[0].T for picture in pictures
    ]
    values = torch.cat(patches).double()
    _, vectors = torch.linalg.eigh(values.T @ values / len(values))
    return vectors.flip(1).T.reshape(-1, 3, factor, factor).float()


@torch.no_grad()
def linear_start(vae: AutoencoderKL, components: Tensor, generator: torch.Generator, anchor: float = ANCHOR) -> None:
    """Sets the weights so that encoding is the first four patch components, and decoding the colour that they carry.

    Three facts make a network full of GroupNorm and SiLU linear:
    a residual block whose last convolution is zero is the identity; silu(x) − silu(−x) = x;
    and GroupNorm divides by (nearly) a constant when each group holds two *anchor* channels of ±`anchor`, made by
    a bias, beside which the others are small. Without anchors GroupNorm would remove the level of a flat colour, and
    a crop would be encoded otherwise than the same place in the whole picture. A larger anchor is closer to linear; a
    smaller one trains better, because optimizer steps on the weights behind it move the output less.
    """
    _quiet_blocks(vae, anchor)
    encoder, decoder = vae.encoder, vae.decoder
    _start_encoder(encoder, components, generator, anchor)
    mean_colors = components[:4].mean(dim=(2, 3))  # [latent, rgb]: the colour of a patch, given its coefficient
    _start_decoder(decoder, mean_colors, generator, anchor)
    vae.quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])
    vae.post_quant_conv.weight.copy_(torch.eye(4)[:, :, None, None])
    vae.quant_conv.bias.zero_()
    vae.post_quant_conv.bias.zero_()


def _quiet_blocks(vae: AutoencoderKL, anchor: float) -> None:
    """Residual branches end in zero; every GroupNorm undoes the division by its anchors' spread."""
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            module.weight.zero_()
            module.bias.zero_()
        if isinstance(module, nn.GroupNorm):
            data, anchors = _channels(module.num_channels, module.num_groups)
            per_group = module.num_channels // module.num_groups
            module.weight[data] = anchor * math.sqrt(2 / per_group)
            module.weight[anchors] = 0
            module.bias.zero_()


def _channels(count: int, groups: int = 8) -> tuple[list[int], list[int]]:
    """(data, anchors): the last two channels of each normalisation group are its anchors."""
    size = count // groups
    anchors = [c for c in range(count) if c % size >= size - 2]
    return [c for c in range(count) if c not in anchors], anchors


def _clear(conv: nn.Conv2d, generator: torch.Generator, anchor: float, gain: float = 1.0) -> list[int]:
    """Random weights from data channels to data channels, anchors in the bias; returns the output's data channels."""
    data, anchors = _channels(conv.out_channels)
    inputs = _channels(conv.in_channels)[0] if conv.in_channels >= 32 else list(range(conv.in_channels))
    fan_in = len(inputs) * conv.kernel_size[0] * conv.kernel_size[1]
    weight = torch.zeros_like(conv.weight)
    noise = torch.randn(len(data), len(inputs), *conv.kernel_size, generator=generator) * gain / math.sqrt(fan_in)
    weight[torch.tensor(data)[:, None], torch.tensor(inputs)] = noise
    conv.weight.copy_(weight)
    conv.bias.zero_()
    conv.bias[anchors[0::2]] = anchor
    conv.bias[anchors[1::2]] = -anchor
    return data


def _start_encoder(encoder: nn.Module, components: Tensor, generator: torch.Generator, anchor: float) -> None:
    color = _clear(encoder.conv_in, generator, anchor)[:3]
    for c, channel in enumerate(color):
        encoder.conv_in.weight[channel] = 0
        encoder.conv_in.weight[channel, c, 1, 1] = 1

    # First halving: each colour of each of the 2×2 pixels becomes a channel.
    halving = encoder.down_blocks[0].downsamplers[0].conv
    unfolded = _clear(halving, generator, anchor)[:12]
    for k, channel in enumerate(unfolded):
        c, dy, dx = k // 4, k // 2 % 2, k % 2
        halving.weight[channel] = 0
        halving.weight[channel, color[c], dy, dx] = 1

    widening = encoder.down_blocks[1].resnets[0].conv_shortcut
    carried = _clear(widening, generator, anchor)[:12]
    for source, target in zip(unfolded, carried, strict=True):
        widening.weight[target] = 0
        widening.weight[target, source] = 1

    # Second halving: now a 3×3 kernel sees the whole 4×4 patch, and its components come out as pairs ±p.
    halving = encoder.down_blocks[1].downsamplers[0].conv
    data = _clear(halving, generator, anchor)
    for pair, component in enumerate(components[: len(data) // 2]):
        kernel = torch.zeros_like(halving.weight[0])
        for k, channel in enumerate(carried):
            c, dy, dx = k // 4, k // 2 % 2, k % 2
            kernel[channel, :2, :2] = component[c, dy::2, dx::2]
        halving.weight[data[2 * pair]] = kernel
        halving.weight[data[2 * pair + 1]] = -kernel

    out = encoder.conv_out  # 4 means, then 4 log-variances
    out.weight.zero_()
    out.bias.zero_()
    out.bias[4:] = -4.0
    for latent in range(4):
        out.weight[latent, data[2 * latent], 1, 1] = 1
        out.weight[latent, data[2 * latent + 1], 1, 1] = -1


def _start_decoder(decoder: nn.Module, mean_colors: Tensor, generator: torch.Generator, anchor: float) -> None:
    carried = _clear(decoder.conv_in, generator, anchor, gain=0.3)[:4]
    for latent, channel in enumerate(carried):
        decoder.conv_in.weight[channel] = 0
        decoder.conv_in.weight[channel, latent, 1, 1] = 1
    for block in decoder.up_blocks:
        for upsampler in block.upsamplers or ():
            _clear(upsampler.conv, generator, anchor)
            for channel in carried:
                upsampler.conv.weight[channel] = 0
                upsampler.conv.weight[channel, channel, 1, 1] = 1

    narrowing = decoder.up_blocks[-1].resnets[0].conv_shortcut
    data = _clear(narrowing, generator, anchor)
    decoder.conv_out.weight.zero_()
    decoder.conv_out.bias.zero_()
    for c in range(3):
        for sign, channel in ((1, data[2 * c]), (-1, data[2 * c + 1])):
            narrowing.weight[channel] = 0
            narrowing.weight[channel, carried, 0, 0] = sign * mean_colors[:, c]
            decoder.conv_out.weight[c, channel, 1, 1] = sign


# -- training -------------------------------------------------------------------------------------------------------


def reconstruction_loss(output: Tensor, pixels: Tensor) -> Tensor:
    """Mean of |e| + 2·e², where overshooting a pixel that is fully black or fully white costs almost nothing.

    Pictures are clamped when they are written, so a target of ±1 stands for everything beyond it.
    """
    error = output - pixels
    beyond = (pixels.abs() > 0.999) & (error * pixels > 0)
    error = torch.where(beyond, 0.02 * error, error)
    return (error.abs() + 2 * error.square()).mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: list[Tensor]) -> float:
    """Decibels over all pixels of all pictures, mean latents, clamped output; peak = the full range."""
    squares, count = 0.0, 0
    for picture in pictures:
        pixels = picture[None].float() / 127.5 - 1
        output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        squares += float((output - pixels).square().sum())
        count += pixels.numel()
    return 10 * math.log10(4 * count / squares)


@torch.no_grad()
def flat_levels(vae: AutoencoderKL) -> dict[str, float]:
    """Brightness in 0..1 of what black, white and mid-grey pictures come back as."""
    levels = {}
    for name, value in (("black", -1.0), ("white", 1.0), ("grey", 0.0)):
        pixels = torch.full((1, 3, 64, 64), value)
        output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        levels[name] = float(output.mean() + 1) / 2
    return levels


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, pictures: list[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each raw latent channel over the pictures (report.md §7)."""
    latents = [vae.encode(p[None].float() / 127.5 - 1).latent_dist.mode()[0].flatten(1) for p in pictures]
    values = torch.cat(latents, dim=1).double()
    return values.mean(dim=1).tolist(), values.std(dim=1).tolist()


def write_asset(vae: AutoencoderKL, pictures: list[Tensor], path: Path) -> None:
    """float16 weights, atomically; normalised latents have mean 0 and deviation 1, the fourth DETAIL_DEVIATION."""
    mean, deviation = latent_moments(vae, pictures)
    deviation[-1] /= DETAIL_DEVIATION
    folded = fold_latent_statistics(copy.deepcopy(vae), mean, deviation)
    state = {name: tensor.half().contiguous() for name, tensor in folded.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary, {"format": "pt", "trained_by": "demo/train_tiny_vae.py"})
    temporary.chmod(0o644)  # safetensors writes for its owner alone
    temporary.replace(path)


def train(
    folders: dict[str, list[Tensor]],
    minutes: float,
    lr: float,
    batch: int,
    seed: int,
    out: Path,
    start_from: Path | None = None,
) -> None:
    """Trains for that long: AdamW, warm-up and cosine over time, weight average; writes `out` every two minutes.

    `folders`: pictures by the folder's name. One in forty is held out for the reported PSNR.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    held_out = {name: pictures[::40] for name, pictures in folders.items()}
    pictures = [p for pictures in folders.values() for k, p in enumerate(pictures) if k % 40]
    vae = AutoencoderKL(**tiny_vae_config()).train().to(memory_format=torch.channels_last)
    for frozen in (vae.encoder, vae.quant_conv):
        frozen.requires_grad_(False)
    if start_from:
        vae.load_state_dict({name: tensor.float() for name, tensor in load_file(start_from).items()})
    else:
        linear_start(vae, patch_components(pictures), torch.Generator().manual_seed(seed))
    average = copy.deepcopy(vae).eval().requires_grad_(False)
    deviation = torch.tensor(latent_moments(vae, pictures[::8])[1])
    learned = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    start = last = time.perf_counter()
    step, running = 0, 0.0
    _report(average, held_out, step, running, 0.0)
    while (share := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * share) + 0.005)
        side = max(side for begin, side in CROPS if share >= begin)
        pixels = random_crops(pictures, batch, side, rng).contiguous(memory_format=torch.channels_last)
        loss = _step(vae, pixels, deviation, optimizer)
        step += 1
        _follow(average, vae, min(AVERAGE_DECAY, step / (step + 20)))
        running += (loss - running) / min(step, 50)
        if time.perf_counter() - last > 120:
            last = time.perf_counter()
            _report(average, held_out, step, running, last - start)
            write_asset(average, pictures[::8], out)
    _report(average, held_out, step, running, time.perf_counter() - start)
    write_asset(average, pictures[::2], out)


def _step(vae: AutoencoderKL, pixels: Tensor, deviation: Tensor, optimizer: torch.optim.Optimizer) -> float:
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    noise = LATENT_NOISE * deviation.float()[:, None, None] * torch.randn_like(latents)
    loss = reconstruction_loss(vae.decode(latents + noise).sample, pixels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _report(vae: AutoencoderKL, held_out: dict[str, list[Tensor]], step: int, loss: float, seconds: float) -> None:
    fidelity = ", ".join(f"{name} {psnr(vae, pictures):.2f} dB" for name, pictures in held_out.items())
    flat = ", ".join(f"{name} {level:.4f}" for name, level in flat_levels(vae).items())
    print(f"{seconds:6.0f} s  step {step}  loss {loss:.4f}  {fidelity}  {flat}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the tiny model's VAE.")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of PNG pictures")
    parser.add_argument("--minutes", type=float, default=30, help="training time (default: 30)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    parser.add_argument("--batch", type=int, default=16, help="crops a step (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", type=Path, help="weights to go on from (default: the linear start)")
    parser.add_argument("--out", type=Path, default=ASSET, help="where the weights go (default: the package's asset)")
    options = parser.parse_args()
    folders = {folder.name: load_pictures(folder) for folder in options.data}
    train(folders, options.minutes, options.lr, options.batch, options.seed, options.out, options.start_from)


if __name__ == "__main__":
    main()
