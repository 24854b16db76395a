"""The loss of held-out pictures by timestep, at noise that never changes: two numbers of one run can be compared.

t = 999 is among them: it is the only way to see whether the step from pure noise is being learned at all.
"""

from collections.abc import Iterable, Sequence

import torch

from sumizome.data.loader import TrainBatch
from sumizome.models.sdxl import SDXLModel
from sumizome.train.step import Objective, training_loss

__all__ = ["validation_loss"]


@torch.no_grad()
def validation_loss(
    model: SDXLModel,
    objective: Objective,
    batches: Iterable[TrainBatch],
    timesteps: Sequence[int],
    max_chunks: int,
) -> dict[str, float]:
    """The unweighted mean squared error at each timestep, over all samples of the batches; keys as JSON needs them.

    The noise is that of the batch's seeds, the same at every timestep and every call.
    """
    sums = dict.fromkeys(timesteps, 0.0)
    samples = 0
    for batch in batches:
        rows = len(batch.seeds)
        samples += rows
        for t in timesteps:
            loss = training_loss(model, objective, batch, torch.full((rows,), t), max_chunks)
            sums[t] += float(loss.unweighted.double().sum())
    return {str(t): total / samples for t, total in sums.items()} if samples else {}
