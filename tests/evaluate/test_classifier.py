"""The classifier learns what can be seen, says how well, and lets go of what cannot: shuffled labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sumizome.evaluate.classifier import (
    TagClassifier,
    _cross_validated,
    label_matrix,
    read_classifier,
    train_classifier,
    usable_tags,
    write_classifier,
)
from sumizome.evaluate.evaluation import tag_recall

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30)}


def pictures(count: int, seed: int) -> tuple[list[np.ndarray], list[list[str]]]:
    """A coloured square or disc on noise, of several shapes, with its tags."""
    random = np.random.default_rng(seed)
    images, tags = [], []
    for _ in range(count):
        height, width = ((32, 32), (32, 48))[random.integers(2)]
        image = random.integers(60, 200, (height, width, 3), dtype=np.uint8)
        colour = str(random.choice(list(COLOURS)))
        rows, columns = np.indices((height, width))
        disc = bool(random.integers(2))
        away = np.hypot(rows - 16, columns - 16) if disc else np.maximum(abs(rows - 16), abs(columns - 16))
        image[away < 10] = COLOURS[colour]
        images.append(image[None])
        tags.append([colour, "disc" if disc else "square", "picture"])
    return images, tags


PARTS = (np.arange(0, 360), np.arange(360, 480), np.arange(480, 600))


@pytest.fixture(scope="module")
def learned() -> TagClassifier:
    images, tags = pictures(600, seed=0)
    return train_classifier(images, tags, PARTS, epochs=5)


def test_what_can_be_seen_is_learned_and_measured_on_other_pictures(learned: TagClassifier) -> None:
    assert set(COLOURS) <= set(learned.skills)
    for colour in COLOURS:
        assert learned.skills[colour].balanced_accuracy > 0.95
        assert learned.skills[colour].count < 120  # of the third part alone
    assert "picture" not in learned.tags  # all have it: nothing to tell


def test_recall_of_real_pictures_and_of_wrong_ones(learned: TagClassifier) -> None:
    images, tags = pictures(90, seed=1)
    right = tag_recall(learned, images, tags)
    assert right["recall"]["value"] > 0.9
    assert right["chance"]["value"] < 0.75
    swapped = {"red": "blue", "blue": "green", "green": "red"}
    wrong = tag_recall(learned, images, [[swapped[own[0]]] for own in tags])
    assert wrong["recall"]["value"] < 0.1
    assert {row["tag"] for row in wrong["by_tag"]} == set(COLOURS)


def test_a_classifier_from_disk_is_the_same(learned: TagClassifier, tmp_path: Path) -> None:
    write_classifier(learned, tmp_path / "c.safetensors")
    again = read_classifier(tmp_path / "c.safetensors")
    images, _ = pictures(20, seed=3)
    assert again.skills == learned.skills
    assert np.array_equal(again.features(images), learned.features(images))
    assert all(np.array_equal(again.found(images)[tag], hits) for tag, hits in learned.found(images).items())


def test_shuffled_labels_teach_nothing_and_no_tag_is_kept() -> None:
    images, tags = pictures(600, seed=2)
    order: Sequence[int] = np.random.default_rng(3).permutation(600).tolist()
    learned = train_classifier(images, [tags[place] for place in order], PARTS, epochs=3)
    assert learned.skills == {}
    assert tag_recall(learned, images[:10], tags[:10]) == {
        "recall": None,
        "chance": None,
        "by_picture": [None] * 10,
        "by_tag": [],
    }


def test_tags_are_chosen_on_the_second_part_and_told_of_the_third() -> None:
    """Labels of the third part that nothing could tell: the tags stay, their accuracy is told as the guess it is."""
    images, tags = pictures(600, seed=0)
    order: Sequence[int] = np.random.default_rng(7).permutation(PARTS[2]).tolist()
    shuffled = tags[:480] + [tags[place] for place in order]
    learned = train_classifier(images, shuffled, PARTS, epochs=5)
    assert set(COLOURS) <= set(learned.skills)
    assert np.mean([skill.balanced_accuracy for skill in learned.skills.values()]) == pytest.approx(0.5, abs=0.1)


def test_a_tag_is_chosen_with_thresholds_of_other_pictures() -> None:
    """The best cut through five positives of noise is better than 80 % in 3 of 100; cross-validated, in 0.5."""
    random = np.random.default_rng(0)
    labels = np.arange(60) < 5
    noise = [_cross_validated(random.normal(size=60), random.permutation(labels)) for _ in range(1000)]
    assert np.mean(np.array(noise) >= 0.8) < 0.015
    assert _cross_validated(random.normal(size=60) + 20 * labels, labels) == 1
    assert _cross_validated(random.normal(size=60) + 20 * labels, np.arange(60) < 4) == 0


def test_tags_that_too_few_have_or_lack_are_not_tried() -> None:
    lists = [["all", "half"] if place % 2 else ["all", "one"][: 1 + (place == 0)] for place in range(10)]
    assert usable_tags(lists, least=2) == ["half"]
    assert label_matrix(lists, ["half"]).sum() == 5


def test_features_tell_the_data_s_own_differences(learned: TagClassifier) -> None:
    from sumizome.evaluate.distances import frechet_distance

    images, tags = pictures(300, seed=5)
    red = learned.features([image for image, own in zip(images, tags, strict=True) if "red" in own])
    blue = learned.features([image for image, own in zip(images, tags, strict=True) if "blue" in own])
    half = len(red) // 2
    assert frechet_distance(red[:half], red[half:]) < frechet_distance(red[:half], blue) / 5
