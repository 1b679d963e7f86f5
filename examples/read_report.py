"""Read what a run says of itself: the losses layer by layer, and whether every file is as it was written.

python examples/read_report.py MODEL-4BIT
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import turbomind_quant as tmq


def main() -> None:
    folder = Path(sys.argv[1])
    manifest = json.loads((folder / "tmq" / "manifest.json").read_text())
    config = manifest["config"]
    print(f"preset {config['preset']}, int{config['bits']}, groups of {config['group_size']}")

    kept: dict[int, float] = defaultdict(float)
    nearest: dict[int, float] = defaultdict(float)
    for entry in manifest["layers"]:  # one entry a linear
        kept[entry["layer"]] += entry["loss_after"] or 0.0
        nearest[entry["layer"]] += entry["loss_rtn"] or 0.0
    for layer in sorted(kept):
        share = kept[layer] / nearest[layer] if nearest[layer] else 1.0
        print(f"layer {layer}: {share:.2f} of the loss of round to nearest")

    checks = tmq.verify(folder)
    print("every byte is as it was written" if checks.passed else "damaged: see `quantize verify`")


if __name__ == "__main__":
    main()
