"""Text out of tokens: a stop string never leaks, wherever the borders of tokens lie."""

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.serving.detokenize import TextStream


class Pieces:
    """A decoder whose token n is the n-th piece of a list."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return ""


def stream(pieces, stop):
    """Text given out after each piece, and at the end."""
    out = TextStream(Pieces(pieces), stop)
    shown = []
    for token in range(len(pieces)):
        text, stopped = out.push(token)
        shown.append(text)
        if stopped:
            break
    shown.append(out.flush()[0])
    return shown


def test_stop_string_across_tokens_is_held_back_and_cut():
    assert stream(["Hello", " wor", "ld. EN", "D", " more"], ["END"]) == ["Hello", " wor", "ld. ", "", ""]


def test_held_text_comes_when_it_turns_out_to_be_harmless():
    assert stream(["a<", "/", "b>"], ["</s>"]) == ["a", "", "</b>", ""]
    assert stream(["a<", "/"], ["</s>"]) == ["a", "", "</"]


def test_the_earliest_of_several_stop_strings_wins():
    assert "".join(stream(["one two three"], ["three", "two"])) == "one "


@given(
    text=st.text("abX", max_size=30),
    stop=st.lists(st.text("abX", min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_text_is_that_before_the_first_stop_string_for_any_borders(text, stop, seed):
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text) + 1, rng.randint(0, 8))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown = stream(pieces, stop)
    # Reference: the stop string that is complete first ends the text; of several complete at once, the one that begins first.
    expected = text
    position = 0
    for piece in pieces:
        position += len(piece)
        places = [text[:position].find(s) for s in stop if s in text[:position]]
        if places:
            expected = text[: min(places)]
            break
    assert "".join(shown) == expected
    for end in range(len(shown)):
        assert not any(s in "".join(shown[: end + 1]) for s in stop)
