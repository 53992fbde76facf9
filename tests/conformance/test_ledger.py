"""The audit itself: it sees what it is there to see."""

from __future__ import annotations

from stentor.testing.conformance.ledger import Entry, audit


def test_an_overlap_of_living_processes_is_seen() -> None:
    """Two starts of a key without an end between them, in two processes that live."""
    entries = [Entry("start", "a", "k", 0), Entry("start", "b", "k", 0), Entry("end", "b", "k", 0)]
    assert audit(entries, [("k", 0)]).overlaps == [("k", 0)]


def test_what_a_paused_process_begins_is_the_stated_exception() -> None:
    """Rule 4: it cannot know at once; but it hides no overlap of two others."""
    entries = [
        Entry("gone", "a"),
        Entry("start", "b", "k", 0),
        Entry("start", "a", "k", 0),
        Entry("start", "c", "k", 0),
        Entry("end", "c", "k", 0),
    ]
    assert audit(entries, [("k", 0)]).overlaps == [("k", 0)]
    assert audit(entries[:3], []).overlaps == []


def test_loss_disorder_and_repetition_are_counted() -> None:
    """Each of them in a ledger of a few lines."""
    entries = [Entry("end", "a", "k", 1), Entry("end", "a", "k", 0), Entry("end", "a", "k", 1)]
    found = audit(entries, [("k", 0), ("k", 1), ("k", 2)])
    assert (found.lost, found.disorder, found.duplicates) == ([("k", 2)], [("k", 0)], 1)
