"""Quantize with a recipe of your own: a preset with other settings.

    python examples/own_recipe.py MODEL OUT

The same as YAML, for `quantize awq --preset FILE.yaml`, is in docs/RECIPES.md.
"""

import sys
from dataclasses import replace

import turbomind_quant as tmq
from quant import recipes


def main() -> None:
    model, out = sys.argv[1:]
    slower = recipes.with_settings("default", steps={"rounds": 4})
    careful = replace(slower, name="careful", label="careful", summary="default with more rounds of descent")
    made = tmq.quantize(model, out, preset=careful, pad=True)
    print(f"{made.path} was made by the recipe {made.preset}")


if __name__ == "__main__":
    main()
