"""The loss of held-out pictures by timestep, at noise that never changes: two numbers of one run can be compared.

t = 999 is among them: it is the only way to see whether the step from pure noise is being learned at all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from sumizome.data.loader import TrainBatch
from sumizome.distributed.runtime import Ranks
from sumizome.models.conditioning import UNetConditioning
from sumizome.models.sdxl import SDXLModel
from sumizome.models.text_encoding import tokenize
from sumizome.shapes import Latents, PerSample, Timesteps
from sumizome.train.lookout import Lookout
from sumizome.train.step import Objective, condition, denoising_loss, draw_noise

__all__ = ["SampleLoss", "loss_of", "losses_by_timestep", "validation_loss"]

SampleLoss = Callable[[TrainBatch, Timesteps, Latents, UNetConditioning], PerSample]
"""The loss of each sample of a batch at its timesteps, with its noise, under its encoded captions."""


def loss_of(model: SDXLModel, objective: Objective) -> SampleLoss:
    """The unweighted mean squared error of what the run learns."""
    return lambda batch, timesteps, noise, conditioning: (
        denoising_loss(model, objective, batch, timesteps, noise, conditioning).unweighted
    )


def losses_by_timestep(
    model: SDXLModel, sample_loss: SampleLoss, batch: TrainBatch, timesteps: Iterable[int], max_chunks: int
) -> Iterator[tuple[int, PerSample]]:
    """(timestep, loss of each sample) at one after the other.

    Captions are encoded once, and the noise is that of the batch's seeds, the same at every timestep and every call.
    """
    conditioning = condition(model, batch, tokenize(batch.captions, max_chunks))
    noise = draw_noise(batch.seeds, batch.latents.shape[1:])
    for t in timesteps:
        yield t, sample_loss(batch, torch.full((len(batch.seeds),), t), noise, conditioning)


@torch.no_grad()
def validation_loss(
    model: SDXLModel,
    sample_loss: SampleLoss,
    batches: Sequence[TrainBatch],
    timesteps: Sequence[int],
    max_chunks: int,
    ranks: Ranks | None = None,
    lookout: Lookout | None = None,
) -> dict[str, float]:
    """The mean of `sample_loss` at each timestep, over all samples of the batches; keys as JSON needs them.

    As `losses_by_timestep`. Every rank has all batches and takes its share; all make equally many forward passes, which
    sharded networks need. Collective.
    Raises: LookEnded on every rank when one is asked to stop.
    """
    ranks, lookout = ranks or Ranks(), lookout or Lookout()
    sums = dict.fromkeys(timesteps, 0.0)
    for batch, counts in _share(batches, ranks):
        lookout.together()
        for t, losses in losses_by_timestep(model, sample_loss, batch, timesteps, max_chunks):
            sums[t] += float(losses.double().sum()) if counts else 0.0
            lookout.together()
    samples = sum(len(batch.seeds) for batch in batches)
    return {str(t): total / samples for t, total in zip(sums, ranks.sums(list(sums.values())), strict=True)}


def _share(batches: Sequence[TrainBatch], ranks: Ranks) -> Iterator[tuple[TrainBatch, bool]]:
    """This rank's batches; where they do not come out even, the last one again, which does not count."""
    for first in range(0, len(batches), ranks.world):
        place = first + ranks.rank
        yield batches[min(place, len(batches) - 1)], place < len(batches)
