"""Stop strings: what is shown never depends on how the text arrives, and never contains a stop string."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from nautile.server.stop import StopFilter

TEXT = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Letter by letter, as the rule says it."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=6))
def test_cut_anyhow_the_rule_decides(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    stop = StopFilter(stops)
    shown = ""
    for begin, end in itertools.pairwise(places):
        shown += stop.feed(text[begin:end])
        assert text.startswith(shown)  # never more than came
        if stop.matched is None:
            assert shown + stop.held == text[:end]  # nothing is lost
            assert not stop.held or any(other.startswith(stop.held) for other in stops)  # nor held without a reason
    shown += stop.flush()
    assert (shown, stop.matched) == naive(text, stops)


def test_without_stop_strings_nothing_is_held() -> None:
    stop = StopFilter(())
    assert stop.feed("abc") == "abc" and stop.held == "" and stop.flush() == ""


def test_nothing_comes_after_the_stop() -> None:
    stop = StopFilter(["x"])
    assert stop.feed("axb") == "a" and stop.feed("more") == "" and stop.flush() == ""
