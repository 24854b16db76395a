"""Which ranks are slow, from their own times."""

from sumizome.train.pace import RankPace, slow_ranks


def pace(own: float, step: float = 1.0) -> RankPace:
    return RankPace(step, own, 0.0)


def test_equal_ranks_are_not_slow() -> None:
    assert slow_ranks([pace(0.6), pace(0.63), pace(0.58)]) == []
    assert slow_ranks([pace(0.9)]) == []


def test_the_slow_one_of_two_and_its_share() -> None:
    assert slow_ranks([pace(0.6), pace(0.9)]) == [{"rank": 1, "share": 0.3}]


def test_what_the_others_do_not_feel_is_not_reported() -> None:
    assert slow_ranks([pace(0.01), pace(0.02)]) == []


def test_most_ranks_set_the_measure() -> None:
    paces = [pace(0.5)] * 6 + [pace(0.9), pace(0.5)]
    assert slow_ranks(paces) == [{"rank": 6, "share": 0.4}]
