"""The loss of held-out pictures by timestep, at noise that never changes: two numbers of one run can be compared.

t = 999 is among them: it is the only way to see whether the step from pure noise is being learned at all.
"""

from collections.abc import Iterator, Sequence

import torch

from sumizome.data.loader import TrainBatch
from sumizome.distributed.runtime import Ranks
from sumizome.models.sdxl import SDXLModel
from sumizome.train.step import Objective, training_loss

__all__ = ["validation_loss"]


@torch.no_grad()
def validation_loss(
    model: SDXLModel,
    objective: Objective,
    batches: Sequence[TrainBatch],
    timesteps: Sequence[int],
    max_chunks: int,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """The unweighted mean squared error at each timestep, over all samples of the batches; keys as JSON needs them.

    The noise is that of the batch's seeds, the same at every timestep and every call. Every rank has all batches and
    takes its share; all make equally many forward passes, which sharded networks need. Collective.
    """
    ranks = ranks or Ranks()
    sums = dict.fromkeys(timesteps, 0.0)
    for batch, counts in _share(batches, ranks):
        for t in timesteps:
            loss = training_loss(model, objective, batch, torch.full((len(batch.seeds),), t), max_chunks)
            sums[t] += float(loss.unweighted.double().sum()) if counts else 0.0
    samples = sum(len(batch.seeds) for batch in batches)
    return {str(t): total / samples for t, total in zip(sums, ranks.sums(list(sums.values())), strict=True)}


def _share(batches: Sequence[TrainBatch], ranks: Ranks) -> Iterator[tuple[TrainBatch, bool]]:
    """This rank's batches; where they do not come out even, the last one again, which does not count."""
    for first in range(0, len(batches), ranks.world):
        place = first + ranks.rank
        yield batches[min(place, len(batches) - 1)], place < len(batches)
