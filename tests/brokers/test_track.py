"""What is done above a group's place: it stays done, through any number of owners."""

from hypothesis import given
from hypothesis import strategies as st

from stentor.brokers.track import Track
from stentor.message import Partition


def owner(prefix: int, done: set[int]) -> Track:
    return Track(Partition("jobs", 0, 1), prefix, done)


def test_what_is_done_further_on_is_not_forgotten_when_nothing_is_outstanding() -> None:
    track = owner(0, {5, 6})
    assert track.take(0)
    track.settle(0)
    assert track.done == {5, 6}
    assert [offset for offset in range(1, 8) if track.take(offset)] == [1, 2, 3, 4, 7]


def test_what_was_removed_from_the_log_is_forgotten() -> None:
    track = owner(0, {1, 5})
    for offset in (0, 2):  # 1 is not there any more
        assert track.take(offset)
        track.settle(offset)
    assert (track.prefix, track.done) == (3, {5})


@given(st.lists(st.tuples(st.integers(1, 3), st.sets(st.integers(0, 5)), st.booleans()), max_size=8))
def test_each_offset_is_handed_out_until_it_is_settled(steps: list[tuple[int, set[int], bool]]) -> None:
    """An owner reads on and settles in any order; then the next begins at its place."""
    log, settled = list(range(0, 12, 2)), set[int]()  # gaps are allowed
    track, read, held = owner(0, set()), iter(log), set[int]()
    for count, ends, handover in steps:
        for _ in range(count):
            if (offset := next(read, None)) is not None:
                assert track.take(offset) == (offset not in settled)
                held |= {offset} - settled
        ended = {2 * end for end in ends} & held
        would = track.with_settled(ended)
        for offset in ended:
            track.settle(offset)
            held.discard(offset)
            settled.add(offset)
        assert would[0] >= track.prefix
        assert all(offset in settled for offset in log if offset < would[0])
        assert would[1] == {offset for offset in track.done if offset >= would[0]}
        assert all(offset in settled for offset in log if offset < track.prefix)
        assert {offset for offset in settled if offset >= track.prefix} <= track.done
        if handover:
            track, held = owner(track.prefix, set(track.done)), set()
            read = iter([offset for offset in log if offset >= track.prefix])
