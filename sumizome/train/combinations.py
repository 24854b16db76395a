"""Settings that are each in order and that no run can have together, or not on so many ranks.

Asked by `train` before anything is loaded, and by `plan`, which must promise no run that would be refused. What a
setting alone, or settings of one process, may be is checked where they are defined.
"""

from sumizome.data.batch_plan import check_world
from sumizome.diffusion.prediction import check_prediction_type
from sumizome.diffusion.schedule import build_noise_schedule
from sumizome.distributed.parallelize import Strategy, resolve_strategy
from sumizome.distributed.runtime import Ranks
from sumizome.errors import ConfigError
from sumizome.train.config import TrainConfig
from sumizome.train.optim import check_rounding

__all__ = ["check_combinations"]


def check_combinations(config: TrainConfig, ranks: Ranks) -> Strategy:
    """The strategy of a run on these ranks, of which only the numbers are read.

    Raises: ConfigError, in any stage.
    """
    strategy = resolve_strategy(config.parallel, ranks)
    # Before the shares: its one micro-batch a step would be told to be more.
    if config.optim.fused_backward and strategy != "none":
        raise ConfigError(
            f"optim.fused_backward is for one device, here several train together ({strategy}); set it to false"
        )
    spans = config.spans()
    for span in spans:
        stage = f"stage {span.name}: " if len(spans) > 1 else ""
        check_world(span.micro_batches_per_step, ranks.world, stage)
    if config.optim.name != "adamw" and strategy in ("fsdp", "hybrid"):
        raise ConfigError(
            f'optim.name = "{config.optim.name}" cannot be cut over ranks ({strategy}); '
            'take "adamw" or parallel.strategy = "ddp"'
        )
    check_rounding(config.optim, in_bfloat16=config.precision == "pure_bf16")
    check_prediction_type(config.prediction_type, build_noise_schedule(config.schedule))
    return strategy
