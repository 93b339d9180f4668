"""What it saves a training step that freed memory stays with the process, as pixnerd/__init__.py asks glibc to.

    python -m tests.measure.kept_memory [STEPS ROUNDS]          60 and 5 by default

The step is that of the digits, eager, with a thread for each core, in a process of its own, in turns with glibc's own
settings. Prints the medians of the rounds in milliseconds, and the median ratio with its range.
"""

import statistics
import sys

from tests.measure.busy_neighbour import milliseconds

GLIBC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}  # its default; named, it makes the package leave malloc alone


def main() -> None:
    steps, rounds = (int(word) for word in sys.argv[1:3] or ("60", "5"))
    kept, given_back = [], []
    for _ in range(rounds):
        kept.append(milliseconds({}, steps, "alone"))
        given_back.append(milliseconds(GLIBC, steps, "alone"))
    ratios = sorted(one / other for one, other in zip(kept, given_back, strict=True))
    print(f"kept {statistics.median(kept):.1f} ms, given back {statistics.median(given_back):.1f} ms")
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
