"""What would make an impossible plan fit: changes of settings, each with its price, the cheapest first."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sumizome.errors import ConfigError
from sumizome.planning.memory import Cluster
from sumizome.planning.networks import Networks
from sumizome.planning.plan import Plan, make_plan
from sumizome.train.config import TrainConfig

__all__ = ["Change", "way_to_fit"]


@dataclass(frozen=True)
class Change:
    """Settings that save memory, and their price in words."""

    settings: Mapping[str, str]
    """Name → value as it is written, with what it means for stages."""
    price: str
    apply: Callable[[TrainConfig], TrainConfig]
    """The settings with this change."""

    @property
    def setting(self) -> str:
        """As it is written."""
        return ", ".join(f"{name} = {value}" for name, value in self.settings.items())


def way_to_fit(plan: Plan, networks: Networks) -> tuple[list[Change], Plan]:
    """The cheapest changes found that make a plan fit, and the plan with them; if it still does not fit, all of them.

    Changes are added in the order of their price until the plan fits, then those that were not needed are taken back. A
    change takes the place of those before it that set one of its settings; what `train` would refuse is passed over.
    """

    def planned(changes: list[Change]) -> Plan | None:
        config = plan.config
        try:
            for change in changes:
                config = change.apply(config)
            return make_plan(config, plan.cluster, networks, plan.work)
        except ConfigError:
            return None

    taken: list[Change] = []
    found = plan
    for change in _changes(plan.config, plan.cluster):
        changes = [other for other in taken if not other.settings.keys() & change.settings.keys()] + [change]
        if (changed := planned(changes)) is not None:
            taken, found = changes, changed
        if found.fits:
            break
    for change in list(taken[:-1]) if found.fits else ():
        without = [other for other in taken if other is not change]
        if (lighter := planned(without)) is not None and lighter.fits:
            taken, found = without, lighter
    return taken, found


def _changes(config: TrainConfig, cluster: Cluster) -> Iterator[Change]:
    """What can be changed, the cheapest first; some of it may be refused on so many GPUs, or beside other settings."""
    spans = config.spans()
    by_picture = all(span.micro_batch_size == 1 for span in spans)
    in_stages = " in every stage" if config.stage else ""
    if cluster.gpus > 1 and config.parallel.strategy not in ("fsdp", "hybrid"):
        sharded = _set(parallel={"strategy": "fsdp"})
        yield Change({"parallel.strategy": '"fsdp"'}, "weights travel in every pass", sharded)
    if config.ema.device != "cpu":
        price = "4 bytes a weight over the bus in each step"
        yield Change({"ema.device": '"cpu"'}, price, _set(ema={"device": "cpu"}))
    if not config.gradient_checkpointing:
        yield Change({"gradient_checkpointing": "true"}, "a third more time", _set(gradient_checkpointing=True))
    if config.precision == "fp32":
        yield Change({"precision": '"bf16"'}, "products in bfloat16 instead of tf32", _set(precision="bf16"))
    if not by_picture:
        each = " and ".join(str(span.images_per_step) for span in spans)
        yield Change(
            {"micro_batch_size": "1", "micro_batches_per_step": f"{each}{' in the stages' if config.stage else ''}"},
            "the same step in smaller parts: slower on a large GPU",
            _in_smaller_parts,
        )
    if config.optim.name == "adamw":
        yield Change({"optim.name": '"adamw8bit"'}, "moments in 8 bits", _set(optim={"name": "adamw8bit"}))
    if not config.offload_text_encoders:
        yield Change({"offload_text_encoders": "true"}, "they travel in each step", _set(offload_text_encoders=True))
    if config.precision != "pure_bf16":
        yield Change(
            {"precision": '"pure_bf16"', "optim.name": '"adamw"'},
            "weights and moments in bfloat16, rounded stochastically",
            _set(precision="pure_bf16", optim={"name": "adamw"}),
        )
    if not config.optim.fused_backward:
        yield Change(
            {"optim.fused_backward": "true", "micro_batches_per_step": f"1{in_stages}"},
            "no accumulation, so that a step is one forward pass; each gradient clipped on its own",
            _fused,
        )
    if not config.optim.fused_backward and not by_picture:
        yield Change(
            {"optim.fused_backward": "true", "micro_batch_size": "1", "micro_batches_per_step": f"1{in_stages}"},
            "no accumulation, so that a step is one picture; each gradient clipped on its own",
            _fused_by_picture,
        )


def _set(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    """Settings by name; a dict holds those of a part."""

    def apply(config: TrainConfig) -> TrainConfig:
        nested = {
            name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return replace(config, **nested)

    return apply


def _in_smaller_parts(config: TrainConfig) -> TrainConfig:
    """One picture a forward pass, and in every stage as many a step as before."""
    stages = tuple(
        replace(stage, micro_batch_size=1, micro_batches_per_step=span.images_per_step)
        for stage, span in zip(config.stage, config.spans(), strict=False)
    )
    per_step = config.micro_batch_size * config.micro_batches_per_step
    return replace(config, micro_batch_size=1, micro_batches_per_step=per_step, stage=stages)


def _fused(config: TrainConfig) -> TrainConfig:
    """One forward pass a step in every stage, of as many pictures as before."""
    stages = tuple(replace(stage, micro_batches_per_step=0) for stage in config.stage)
    optim = replace(config.optim, fused_backward=True)
    return replace(config, micro_batches_per_step=1, stage=stages, optim=optim)


def _fused_by_picture(config: TrainConfig) -> TrainConfig:
    fused = _fused(config)
    return replace(fused, micro_batch_size=1, stage=tuple(replace(stage, micro_batch_size=0) for stage in fused.stage))
