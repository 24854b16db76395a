"""Whom the watchdog names: a rank that gives no sign of life, or the one that the others wait for."""

from dataclasses import replace

from torch.distributed import HashStore

from sumizome.distributed.watchdog import Sign, read_signs, verdict


def sign(step: int, place: int = 0, doing: str = "in forward and backward") -> Sign:
    return Sign(5, step, place, doing, "host-a")


def test_nothing_is_said_while_all_get_on() -> None:
    assert verdict([sign(3), sign(3)], [1.0, 2.0], [1.0, 2.0], timeout=10.0) == ""
    # One stands still because it waits for the other, which works: no hang.
    assert verdict([sign(3, 9), sign(3, 1)], [1.0, 1.0], [50.0, 2.0], timeout=10.0) == ""


def test_a_rank_without_a_sign_of_life_is_named_with_where_it_was() -> None:
    said = verdict([sign(3), sign(2, 1)], [1.0, 11.0], [11.0, 11.0], timeout=10.0)
    assert said == "rank 1 on host-a (step 2, in forward and backward) has given no sign of life for 10 s"


def test_where_all_live_and_none_gets_on_the_one_behind_is_named() -> None:
    said = verdict([sign(7, 3), sign(7, 0, "waiting for data"), sign(7, 3)], [1.0] * 3, [20.0] * 3, timeout=10.0)
    assert said == "rank 1 on host-a (step 7, waiting for data) has stood still for 10 s"


def test_all_at_one_place_blames_none_of_them() -> None:
    assert verdict([sign(7), sign(7)], [1.0] * 2, [20.0] * 2, timeout=10.0).startswith("all ranks have stood still")


def test_the_first_step_may_take_long() -> None:
    assert verdict([Sign(5, host="a"), sign(1)], [1.0] * 2, [500.0] * 2, timeout=10.0) == ""


def test_a_sign_comes_back_as_it_was_sent() -> None:
    for each in (sign(3, 2), replace(sign(3, 2), is_first=True)):
        assert Sign.decode(each.encode()) == each


def test_a_rank_that_was_stopped_before_its_first_sign_is_waited_for_and_named_like_any_other() -> None:
    store, before = HashStore(), [Sign(0, host="host-a"), Sign(0, host="host-b")]
    store.set("0", sign(3).encode())
    signs = read_signs(store, before)
    assert signs == [sign(3), before[1]]
    said = verdict(signs, [1.0, 11.0], [1.0, 11.0], timeout=10.0)
    assert said == "rank 1 on host-b (step 0, starting) has given no sign of life for 10 s"
    store.set("1", sign(2).encode())
    assert read_signs(store, signs) == [sign(3), sign(2)]
