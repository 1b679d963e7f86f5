"""What quantization cost: perplexity with its interval, the places where two models disagree most, and a page of it all.

    python examples/evaluate.py MODEL MODEL-4BIT PAGE.html [WINDOWS]

The page needs the extra [report].
"""

import json
import sys
from pathlib import Path

import turbomind_quant as tmq


def main() -> None:
    model, quantized, page, *windows = sys.argv[1:]
    report = tmq.compare(model, quantized, windows=int(windows[0]) if windows else None, max_tokens=24)
    first, second = report.rows
    print(f"perplexity {first.result.ppl:.3f} -> {second.result.ppl:.3f}")
    if second.against is not None:
        print(f"difference, 95 %: {second.against.low:+.3f} to {second.against.high:+.3f}")
    for place in report.places:
        before, after = place.probability
        print(f"KL {place.kl:.2f}: {place.token!r} was {before:.1%} likely and is {after:.1%}")

    results = Path(page).with_suffix(".json")
    results.write_text(json.dumps(report.to_json()))
    print(tmq.report(results, quantized, output=page))


if __name__ == "__main__":
    main()
