"""Quantize a model to 4 bits, with its progress on one line.

    python examples/quantize.py MODEL OUT [TEXT]

MODEL is a folder of safetensors, a .gguf file or a hub name; OUT a folder that does not exist yet; TEXT a file of calibration
text. Without TEXT the model writes its own.
"""

import sys

import turbomind_quant as tmq


def show(event: tmq.ProgressEvent) -> None:
    """Count layers and steps in place; print sentences as they come."""
    if event.kind in ("layer", "step"):
        print(f"\r{event.stage}: {event.done}/{event.total}  {event.text}   ", end="", flush=True)
    elif event.kind == "end":
        print()
    elif event.text:
        print(event.text)


def main() -> None:
    model, out, *text = sys.argv[1:]
    made = tmq.quantize(
        model,
        out,
        calib_data=text[0] if text else None,
        pad=True,  # exact zero-padding, so that groups of 128 fit any model
        progress=show,
    )
    print(f"{made.path}: {made.bits_per_weight:.3f} bits a weight, {made.size_bytes / 2**20:.0f} MiB")
    for remark in (*made.warnings, *made.standing_out):
        print(f"look at: {remark}")


if __name__ == "__main__":
    main()
