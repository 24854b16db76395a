"""Show what each sampling step means: timestep, sigma, SNR, and how much the loss weighs it in training."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

    from sumizome.diffusion.loss import LossConfig
    from sumizome.diffusion.schedule import NoiseSchedule

__all__ = ["Command", "ScheduleRow", "run", "schedule_rows"]


@dataclass(frozen=True)
class Command:
    """The sampling grid, and the training that it will meet. Defaults are those of `train` and `sample`."""

    steps: int = 28
    """Sampling steps. 28 is the report's."""

    grid: Literal[
        "native", "trailing", "sgm_uniform", "simple", "beta", "karras", "exponential", "polyexponential", "kl_optimal"
    ] = "native"
    """native: evenly in timestep, the report's. trailing: diffusers' rounding. sgm_uniform, simple, beta, kl_optimal:
    ComfyUI's. karras, exponential, polyexponential: one step from pure noise, then that spacing."""

    sigma_max: float | Literal["pure", "ui", "canvas"] | None = None
    """Where sampling starts. pure: the schedule's last timestep. ui: the 4518.76 of ComfyUI and A1111. canvas:
    --base-sigma-max at 512×512, doubled with the side. A number: that sigma. Left out: canvas or pure."""

    base_sigma_max: float = 14.6146
    """Sigma of 512×512 pixels, for --sigma-max canvas."""

    canvas: tuple[int, int] | None = None
    """Height and width in pixels, for --sigma-max canvas. Left out: 1024 1024."""

    zero_terminal_snr: bool = True
    """SDXL's schedule rescaled to end at pure noise, or SDXL's own, which ends at sigma 14.6."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    """What the network predicts; the weights multiply its squared error. epsilon needs --no-zero-terminal-snr."""

    weighting: Literal["min_snr", "soft_min_snr", "uniform"] = "min_snr"
    """Weights of the loss: the report's MinSNR, the same without its corner, or 1 everywhere."""

    gamma: float = 5.0
    """MinSNR's γ, the SNR above which the weight stops rising."""

    terminal_floor: float = 0.1
    """Least weight where noise outweighs signal; 0 = none, which leaves the step from pure noise without gradient."""

    json: bool = False
    """Print a JSON list instead of a table, one object a step."""


@dataclass(frozen=True)
class ScheduleRow:
    """One evaluation of the network."""

    timestep: int
    """What the network is told: the table's entry nearest to sigma."""

    sigma: float
    """Noise level of the state; 20000 stands for infinity."""

    snr: float
    """1/sigma²; exactly 0 where the network is told that it sees pure noise."""

    min_snr_weight: float
    """Plain MinSNR at this SNR."""

    loss_weight: float
    """The weight that training uses at this SNR."""


def run(command: Command) -> None:
    """Prints the table, or its rows as JSON.

    Raises:
        ConfigError: settings that are out of range or exclude each other.
    """
    rows = schedule_rows(command)
    if command.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(_table(rows, command))
    console.print(_caption(command), highlight=False)


def schedule_rows(command: Command) -> list[ScheduleRow]:
    """The rows that `command` asks for, from the noisiest step to the last; the final sigma 0 has no evaluation."""
    import torch

    from sumizome.diffusion.loss import min_snr_weight, snr_loss_weight
    from sumizome.diffusion.prediction import check_prediction_type
    from sumizome.diffusion.sigmas import build_sigmas

    schedule, loss = _schedule(command), _loss(command)
    check_prediction_type(command.prediction_type, schedule)
    sigma_max = command.sigma_max or ("canvas" if command.canvas else "pure")
    canvas = command.canvas or (1024, 1024)
    sigmas = build_sigmas(command.grid, command.steps, schedule, sigma_max, canvas, command.base_sigma_max)[:-1]
    timesteps = schedule.timestep_of(sigmas)
    # Exactly the table's 0 at the terminal timestep, whatever number stands for infinity.
    snr = torch.where(schedule.snr[timesteps] == 0, 0.0, sigmas**-2)
    columns = (
        timesteps,
        sigmas,
        snr,
        min_snr_weight(snr, command.gamma, command.prediction_type),
        snr_loss_weight(loss, snr, command.prediction_type),
    )
    return [ScheduleRow(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _schedule(command: Command) -> "NoiseSchedule":
    from sumizome.diffusion.schedule import ScheduleConfig, build_noise_schedule

    return build_noise_schedule(ScheduleConfig(zero_terminal_snr=command.zero_terminal_snr))


def _loss(command: Command) -> "LossConfig":
    from sumizome.diffusion.loss import LossConfig

    return LossConfig(weighting=command.weighting, gamma=command.gamma, terminal_floor=command.terminal_floor)


def _table(rows: list[ScheduleRow], command: Command) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"{command.grid}, {len(rows)} steps", title_justify="left")
    for heading in ("step", "timestep", "sigma", "snr", "MinSNR weight", "weight used"):
        table.add_column(heading, justify="right")
    for step, row in enumerate(rows, start=1):
        floored = row.loss_weight != row.min_snr_weight
        used = f"[bold]{_number(row.loss_weight)}[/bold]" if floored else _number(row.loss_weight)
        table.add_row(
            str(step), str(row.timestep), _number(row.sigma), _number(row.snr), _number(row.min_snr_weight), used
        )
    table.add_row("", "", "0", "", "", "")
    return table


def _caption(command: Command) -> str:
    """Where the training weight lies: what the floor is for, in two numbers."""
    from sumizome.diffusion.loss import build_loss_weights, min_snr_weight

    schedule = _schedule(command)
    noisiest = schedule.num_timesteps * 9 // 10
    plain = min_snr_weight(schedule.snr, command.gamma, command.prediction_type)
    used = build_loss_weights(_loss(command), schedule, command.prediction_type)
    shares = (f"{float(weights[noisiest:].sum() / weights.sum()):.2%}" for weights in (plain, used))
    return "Share of the training weight at t >= {}: plain MinSNR {}, used here {}.".format(noisiest, *shares)


def _number(value: float) -> str:
    """Four significant digits; powers of ten only where zeros would hide them."""
    if value == 0:
        return "0"
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}" if value >= 1e-4 else f"{value:.1e}"
