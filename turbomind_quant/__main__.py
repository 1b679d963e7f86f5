"""`python -m turbomind_quant` is the command `tmq`."""

import sys

from turbomind_quant.cli.tmq import tmq

if __name__ == "__main__":
    sys.exit(tmq(prog_name="tmq"))
