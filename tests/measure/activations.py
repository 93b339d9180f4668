"""What a training step keeps for its backward pass, per 256-pixel image on a GPU.

python -m tests.measure.activations

Counted from shapes, without a GPU, for eager operators; the column "state" has what is kept throughout training.
"""

import itertools

import torch

from pixnerd import SIZES, PixNerd
from pixnerd.cost import saved_activation_bytes, state_bytes

POLICIES = "none", "head", "all"


def main() -> None:
    print(f"torch {torch.__version__}; MiB per image; state in GiB")
    print("".join(f"{title:>12}" for title in ("size", "kernel", "dtype", "state", *POLICIES)))
    for size, kernel in itertools.product(("L/16", "XL/16"), ("fused", "torch")):
        with torch.device("meta"):
            model = PixNerd(SIZES[size], 1000, field_kernel=kernel)
        for dtype in (torch.bfloat16, torch.float32):
            kept = [saved_activation_bytes(model, 256, policy, dtype) / 2**20 for policy in POLICIES]
            numbers = "".join(f"{value:12.1f}" for value in (state_bytes(model) / 2**30, *kept))
            print(f"{size:>12}{kernel:>12}{str(dtype).removeprefix('torch.'):>12}{numbers}")


if __name__ == "__main__":
    main()
