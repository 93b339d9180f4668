"""One token grid, many pixel grids: python -m tests.measure.any_resolution runs/any-resolution

16 vector emoji, each its own class, are drawn at 512 pixels and learnt by two models that see 32 × 32 pixels in 16
patches: the fields of one are trained only at 32 pixels, those of the other at 32, 48, 64 and 128. Both then sample
every emoji at all four sizes from the same 16 tokens. The table has the PSNR (dB, on the range −1 … 1) against the
true picture of that size, and that of the model's own 32-pixel sample, enlarged bicubically.
"""

import dataclasses
import sys
from pathlib import Path

import resvg_py
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from pixnerd import SIZES, data, load, sample
from pixnerd.data import emoji
from pixnerd.recipes import cpu_can_compile, cpu_has_bfloat16
from pixnerd.sampling import SamplingConfig, sample_noise
from pixnerd.training import TrainConfig, train

CONCEPTS, BASE, SIZES_SAMPLED = 16, 32, (32, 48, 64, 128)
TRAINED_AT = {"one size": (), "several sizes": SIZES_SAMPLED}


def draw_originals(folder: Path) -> None:
    """One sub-folder for each concept with its picture at 512 pixels, in the layout of `folder:` data sets."""
    small = data.load("emoji:flat", 32)
    drawings = emoji.read_drawings(emoji.fetch(emoji.VECTOR_STYLES["flat"]), small.concepts)
    for i in torch.linspace(0, len(small) - 1, CONCEPTS).long().tolist():  # from all groups
        code = small.concepts[i].code
        path = folder / code / "flat.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=drawings[code].svg(512), background="white")))


def config(folder: Path, out: Path, decode_sizes: tuple[int, ...], steps: int) -> TrainConfig:
    return TrainConfig(
        out=str(out),
        data=f"folder:{folder}",
        model=dataclasses.replace(SIZES["micro/8"], prediction="x", field_width=32, field_blocks=2),
        decode_sizes=decode_sizes,
        steps=steps,
        batch_size=CONCEPTS,
        learning_rate=3e-3,
        warmup_steps=50,
        decay="linear",
        betas=(0.9, 0.95),
        label_dropout=0.0,
        clip=1.0,
        ema_decay=0.995,
        recompute="none",
        compile="on" if cpu_can_compile() else "off",
        precision="bfloat16" if cpu_has_bfloat16() else "float32",
        checkpoint_every=500,
        sampling=SamplingConfig(steps=25, guidance=1.0),
    )


def psnr(images: Tensor, true: Tensor) -> float:
    """Mean over images [B, C, H, W] in [−1, 1] of 10·log₁₀(2² / mean squared error), in dB."""
    return float((10 * torch.log10(4 / (images - true).square().mean((1, 2, 3)))).mean())


def enlarge(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False).clamp(-1, 1)


def main(root: Path, steps: int = 2000) -> None:
    originals = root / "originals"
    if not originals.is_dir():
        draw_originals(originals)
    true = {}
    for size in SIZES_SAMPLED:
        dataset = data.load(f"folder:{originals}", size)
        true[size] = torch.stack([dataset[i][0] for i in range(CONCEPTS)])
    finest = sample_noise((3, 128, 128), range(CONCEPTS))
    print("| size | " + " | ".join(f"{name}: fields, bicubic" for name in TRAINED_AT) + " |\n|---|---|---|")
    sampled: dict[str, dict[int, Tensor]] = {}
    for name, decode_sizes in TRAINED_AT.items():
        run = config(originals, root / name.replace(" ", "-"), decode_sizes, steps)
        for _ in tqdm(train(run), total=steps, desc=name, mininterval=10):
            pass
        model, labels = load(run.out), torch.arange(CONCEPTS)
        options = dataclasses.asdict(run.sampling)
        sampled[name] = {}
        for size in SIZES_SAMPLED:  # the transformer sees the same noise at every size
            noise = F.interpolate(finest, (size, size), mode="nearest")
            images = sample(model, labels, noise=noise, base_resolution=(BASE, BASE), **options)
            sampled[name][size] = images.clamp(-1, 1)
    for size in SIZES_SAMPLED:
        cells = [
            f"{psnr(images[size], true[size]):.1f}, {psnr(enlarge(images[BASE], size), true[size]):.1f}"
            for images in sampled.values()
        ]
        print(f"| {size / BASE:g}× | " + " | ".join(cells) + " |")
    several = sampled["several sizes"]
    rows = [enlarge(several[BASE], 128), several[128], sampled["one size"][128], true[128]]
    save_image(make_grid(torch.cat(rows) / 2 + 0.5, nrow=CONCEPTS), root / "sheet.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
