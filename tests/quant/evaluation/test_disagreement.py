"""Where two models disagree most: against a plain float64 computation over all positions."""

import torch

from quant.evaluation.disagreement import CONTEXT, STRETCH, DisagreementSearch


def test_the_largest_divergences_are_found_wherever_a_window_is_cut() -> None:
    generator = torch.Generator().manual_seed(2)
    windows, length, vocab = 3, 2 * STRETCH + 11, 13
    ids = torch.randint(0, vocab, (windows, length), generator=generator)
    first, second = torch.randn(2, windows, length - 1, vocab, generator=generator).mul(2).log_softmax(-1)
    search = DisagreementSearch(4)
    for window in range(windows):
        for start in range(0, length - 1, STRETCH):  # the engine hands over ranges of rows
            rows = slice(start, min(start + STRETCH, length - 1))
            search(window, rows, first[window, rows], second[window, rows])
    places = search.places(ids, lambda tokens: " ".join(map(str, tokens)))

    kl = (first.double().exp() * (first.double() - second.double())).sum(-1)  # (windows, length - 1)
    best = {}  # the largest of each stretch
    for window in range(windows):
        for row in range(length - 1):
            key = (window, row // STRETCH)
            best[key] = max(best.get(key, (0.0, 0)), (float(kl[window, row]), row))
    wanted = sorted(((value, window, row) for (window, _), (value, row) in best.items()), reverse=True)[:4]
    assert [(p.window, p.position) for p in places] == [(window, row + 1) for _, window, row in wanted]
    for place, (value, window, row) in zip(places, wanted, strict=True):
        assert abs(place.kl - value) < 1e-5
        target = int(ids[window, row + 1])
        assert place.token == str(target)
        pair = (float(first[window, row, target].exp()), float(second[window, row, target].exp()))
        assert place.probability == pair
        assert place.likeliest == (
            str(int(first[window, row].argmax())),
            str(int(second[window, row].argmax())),
        )
        assert place.before.split() == [str(int(i)) for i in ids[window, max(0, row + 1 - CONTEXT) : row + 1]]
