"""How many examples a parity property draws: few by default, many with `MANTA_PARITY=full`."""

import os

FULL = os.environ.get("MANTA_PARITY") == "full"
FACTOR = 20


def examples(default: int) -> int:
    """`default`, or `FACTOR` times as many in a full run."""
    return default * FACTOR if FULL else default
