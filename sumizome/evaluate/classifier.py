"""A small network that says which of the data's own tags a picture shows, and what it can be trusted with.

Owns training it, its thresholds, and its stated accuracy. The invariant: it is trained on one part of the data, its
thresholds are set and its tags chosen on a second, its accuracy is told of a third and decides nothing; a tag that it
cannot tell is left out, not guessed. Its last hidden layer is the built-in feature space of `distances`.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from sumizome.evaluate.scores import Images
from sumizome.files import write_atomically
from sumizome.seeds import derive_seed

__all__ = [
    "FEATURES",
    "SIDE",
    "Labels",
    "TagClassifier",
    "TagSkill",
    "label_matrix",
    "read_classifier",
    "train_classifier",
    "usable_tags",
    "write_classifier",
]

SIDE = 64
"""px: pictures of any size and shape are brought to this square."""

FEATURES = 128
_BATCH = 64
_LR = 3e-3
_LEAST_SHOWN = 5
"""Pictures with a tag, in each of the parts that decide and tell."""
_FOLDS = 5

Labels = Bool[np.ndarray, "n tags"]


@dataclass(frozen=True)
class TagSkill:
    """What the classifier is worth on one tag: of pictures that neither trained it, set its threshold nor chose it."""

    tag: str
    threshold: float
    """On the logit."""
    recall: float
    """Of the real pictures with the tag, the share in which it is found: no model can be expected to do better."""
    false_rate: float
    """Of the real pictures without the tag, the share in which it is found all the same."""
    count: int
    """Real pictures with the tag that this was measured on."""

    @property
    def balanced_accuracy(self) -> float:
        """½ is guessing."""
        return (self.recall + 1 - self.false_rate) / 2


class _Network(nn.Module):
    """Four halvings, mean and maximum over what is left, one hidden layer."""

    def __init__(self, tags: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.hidden = nn.Linear(2 * 128, FEATURES)
        self.head = nn.Linear(FEATURES, tags)

    def features(self, pixels: Tensor) -> Tensor:
        found = self.body(pixels)
        return F.relu(self.hidden(torch.cat([found.mean((2, 3)), found.amax((2, 3))], dim=1)))

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.features(pixels)))


class TagClassifier:
    """A trained network, the tags it can tell, and how well."""

    def __init__(self, network: "_Network", tags: Sequence[str], skills: Sequence[TagSkill]) -> None:
        self.network = network
        self.tags = tuple(tags)
        self.skills = {skill.tag: skill for skill in skills}
        """Of the tags that it can tell."""

    def found(self, images: Sequence[Images]) -> dict[str, Bool[np.ndarray, " n"]]:
        """For each tag that it can tell: in which pictures it is found."""
        logits = _apply(self.network, _squares(images))
        places = {tag: number for number, tag in enumerate(self.tags)}
        return {tag: logits[:, places[tag]] > skill.threshold for tag, skill in self.skills.items()}

    def features(self, images: Sequence[Images]) -> Float[np.ndarray, "n d"]:
        """The last hidden layer of each picture, float64."""
        return _apply(self.network.features, _squares(images)).astype(np.float64)


def usable_tags(tag_lists: Sequence[Sequence[str]], least: int) -> list[str]:
    """Tags that at least so many pictures have, and as many have not; the most frequent first."""
    counts = Counter(tag for tags in tag_lists for tag in set(tags))
    return [tag for tag, count in counts.most_common() if least <= count <= len(tag_lists) - least]


def label_matrix(tag_lists: Sequence[Sequence[str]], tags: Sequence[str]) -> Labels:
    """Which picture has which tag."""
    return np.array([[tag in set(own) for tag in tags] for own in tag_lists], bool).reshape(len(tag_lists), len(tags))


def train_classifier(
    images: Sequence[Images],
    tag_lists: Sequence[Sequence[str]],
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    epochs: int = 12,
    least: int = 30,
    least_accuracy: float = 0.8,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> TagClassifier:
    """Trained on the first part of the rows, thresholds and tags from the second, skill from the third.

    `images`: one array a picture, of any sizes. A tag is kept if its balanced accuracy on the second part is at least
    `least_accuracy` (cross-validated, as the threshold is set there, too) and at least 5 pictures of the second and of
    the third show it. How well it does on the third decides nothing, or what is told of it would be too good.
    Deterministic on one machine and number of threads.
    """
    train, calibration, test = parts
    squares = _squares(images)
    tags = usable_tags([tag_lists[row] for row in train.tolist()], least)
    labels = label_matrix(tag_lists, tags)
    network = _fit(squares[train], labels[train], epochs, seed, on_step)
    logits = _apply(network, squares)
    skills = []
    for number, tag in enumerate(tags):
        known, truth = logits[calibration, number], labels[calibration, number]
        if _cross_validated(known, truth) < least_accuracy:
            continue
        skill = _skill(tag, _best_threshold(known, truth), logits[test, number], labels[test, number])
        if skill is not None and skill.count >= _LEAST_SHOWN:
            skills.append(skill)
    return TagClassifier(network, tags, skills)


def write_classifier(classifier: TagClassifier, path: Path) -> None:
    """One safetensors file: the network, and in its metadata the tags and what it is worth on each."""
    facts = {"tags": classifier.tags, "skills": [asdict(skill) for skill in classifier.skills.values()]}
    content = save(classifier.network.state_dict(), {"classifier": json.dumps(facts)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_classifier(path: Path) -> TagClassifier:
    """What `write_classifier` wrote."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["classifier"])
        network = _Network(len(facts["tags"]))
        names = file.keys()  # the file itself cannot be iterated
        network.load_state_dict({name: file.get_tensor(name) for name in names})
    return TagClassifier(network.eval(), facts["tags"], [TagSkill(**skill) for skill in facts["skills"]])


def _fit(
    squares: Tensor, labels: Labels, epochs: int, seed: int, on_step: Callable[[int, int], None] | None
) -> _Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "classifier"))
        network = _Network(labels.shape[1])
        truth = torch.from_numpy(labels).float()
        share = truth.mean(0).clamp(0.01, 0.99)
        # Rare tags would else be answered with "no" and cost little.
        weight = ((1 - share) / share).sqrt()
        optimizer = torch.optim.AdamW(network.parameters(), lr=_LR, weight_decay=0.05)
        total = epochs * -(-len(squares) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=total)
        done = 0
        for _ in range(epochs):
            for rows in torch.randperm(len(squares)).split(_BATCH):
                # No flips: the data may say left and right.
                loss = F.binary_cross_entropy_with_logits(network(squares[rows]), truth[rows], pos_weight=weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                done += 1
                if on_step is not None:
                    on_step(done, total)
    return network.eval()


def _best_threshold(logits: np.ndarray, labels: np.ndarray) -> float:
    """The logit at which balanced accuracy is highest, half-way between neighbours; 0 where a class is missing."""
    order = np.argsort(logits)
    positive = labels[order]
    if not positive.any() or positive.all():
        return 0.0
    # Below a cut after i pictures: positives missed, negatives rejected.
    missed = np.concatenate([[0], np.cumsum(positive)]) / positive.sum()
    rejected = np.concatenate([[0], np.cumsum(~positive)]) / (~positive).sum()
    cut = int(np.argmax(rejected - missed))
    padded = np.concatenate([[logits.min() - 1], logits[order], [logits.max() + 1]])
    return float((padded[cut] + padded[cut + 1]) / 2)


def _cross_validated(logits: np.ndarray, labels: np.ndarray) -> float:
    """Balanced accuracy with the threshold of each fifth from the other four; 0 for what too few have or lack.

    Of the pictures that set a threshold even noise is told well: the best of all cuts through few positives.
    """
    if min(labels.sum(), (~labels).sum()) < _LEAST_SHOWN:
        return 0.0
    fold = np.empty(len(labels), int)
    for of_class in (labels, ~labels):
        fold[of_class] = np.arange(of_class.sum()) % _FOLDS
    found = np.zeros(len(labels), bool)
    for number in range(_FOLDS):
        own = fold == number
        found[own] = logits[own] > _best_threshold(logits[~own], labels[~own])
    return float(found[labels].mean() + (~found)[~labels].mean()) / 2


def _skill(tag: str, threshold: float, logits: np.ndarray, labels: np.ndarray) -> TagSkill | None:
    if not labels.any() or labels.all():
        return None
    found = logits > threshold
    return TagSkill(tag, threshold, float(found[labels].mean()), float(found[~labels].mean()), int(labels.sum()))


def _squares(images: Sequence[Images]) -> Tensor:
    """All pictures at SIDE × SIDE in −1 … 1, [n, 3, S, S] float32; each array holds one picture or several."""
    parts = []
    for image in images:
        pixels = torch.from_numpy(np.array(image)).permute(0, 3, 1, 2).float() / 127.5 - 1
        if pixels.shape[-2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        parts.append(pixels)
    return torch.cat(parts)


@torch.no_grad()
def _apply(function: Callable[[Tensor], Tensor], squares: Tensor) -> np.ndarray:
    return torch.cat([function(part) for part in squares.split(256)]).numpy()
