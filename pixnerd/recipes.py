"""Named training recipes: the published ones, and ones for small data on a laptop or a single GPU."""

import dataclasses
import os
import shutil

from .config import STUDENT_SAMPLING, SamplingConfig, TrainConfig
from .errors import InputError
from .model_config import SIZES


class Recipes(dict[str, TrainConfig]):
    """Recipes by name; an unknown name raises an InputError that lists the known ones."""

    def __missing__(self, name: str) -> TrainConfig:
        raise InputError(f"recipe {name!r} is unknown; known recipes: {', '.join(self)}")


# Text to image in three stages, arXiv 2507.23268: 45 million captioned images at 256 pixels, the same at 512, then 60
# thousand instruction images. Each stage starts from the previous one; name your shards with --data shards:PATH.
TEXT_256 = TrainConfig(
    out="runs/text-256",
    data="shards:data/captioned",
    model=dataclasses.replace(SIZES["XXL/16"], image_size=256),
    steps=200_000,
    batch_size=1536,
    learning_rate=2e-4,
    betas=(0.9, 0.95),
    clip=1.0,
    cache_text=False,  # the features of millions of captions do not fit on a disk
    noise="philox",  # for GPUs, whose models differ in torch's numbers; recipes for a CPU keep those of their figures
    time_shift=2.0,
    accumulate=4,  # of 192 images a GPU 48 at a time, which eight GPUs of 80 GB hold
    workers=8,
    sampling=SamplingConfig(steps=25, solver="adams2", guidance=4.0, interval=(0.0, 1.0), shift=3.0),
)
TEXT_512 = dataclasses.replace(
    TEXT_256,
    out="runs/text-512",
    model=SIZES["XXL/16"],
    start_from=TEXT_256.out,
    steps=80_000,
    batch_size=512,
    learning_rate=1e-4,
    time_shift=4.0,
)
# The paper gives neither steps nor batch size for tuning. The authors' configuration (configs_t2i/sft_res512.yaml) has
# these betas, and as upper limits 60,000 steps and 24 images a GPU; 10,000 steps of 128 images, 21 epochs, are our
# choice.
TEXT_TUNE = dataclasses.replace(
    TEXT_512,
    out="runs/text-tune",
    data="shards:data/instruction",
    start_from=TEXT_512.out,
    steps=10_000,
    batch_size=128,
    learning_rate=1e-5,
    betas=(0.9, 0.999),
    accumulate=1,
)

# Emoji from captions read by MiniLM: needs only wheels and npm.
EMOJI_TEXT = TrainConfig(
    data="emoji",
    model=dataclasses.replace(SIZES["text-micro/8"], prediction="x"),
    text_encoder="minilm",
    steps=8000,
    batch_size=64,
    learning_rate=2e-3,
    warmup_steps=100,
    decay="linear",
    betas=(0.9, 0.95),
    clip=1.0,
    ema_decay=0.998,
    recompute="none",
    checkpoint_every=500,
    # the last step begins at t = 0.69 and is not guided: later ones spoil single pixels, and guidance saturates colours
    sampling=SamplingConfig(steps=10, guidance=3.0, interval=(0.0, 0.6), shift=4.0),
)

# Students of the published ImageNet models: first the teacher's paths, then one step sharpened by FD-loss. Nobody has
# trained these yet. FD-loss's own (2604.28190) are 1,024 images a step, AdamW with 1e-5 along half a cosine, 50 · 1,250
# steps, and moments that are moving averages with 0.999; the rest of both is our choice.
STUDENT = TrainConfig(
    out="runs/student",
    model=SIZES["XL/16"],
    steps=50_000,
    warmup_steps=1_000,
    decay="cosine",
    betas=(0.9, 0.95),
    label_dropout=0.0,
    clip=1.0,
    ema_decay=0.999,
    workers=8,
    noise="philox",
    sampling=STUDENT_SAMPLING,
)
STUDENT_FD = dataclasses.replace(
    STUDENT,
    out="runs/student-fd",
    steps=62_500,
    batch_size=1024,
    learning_rate=1e-5,
    warmup_steps=0,
    recompute="all",  # the images of a step are all computed at once
)

RECIPES = Recipes(
    {
        # arXiv 2507.23268: 160 epochs of ImageNet on many GPUs; name your copy with --data folder:PATH
        # no mirrored images: the authors' configuration has none
        "imagenet-256": TrainConfig(model=SIZES["XL/16"], workers=8, noise="philox"),
        "text-256": TEXT_256,
        "text-512": TEXT_512,
        "text-tune": TEXT_TUNE,
        # two and a quarter minutes on two CPU cores, compiling included; see notebooks/measured_models.md
        "digits-cpu": TrainConfig(
            data="digits",
            model=dataclasses.replace(SIZES["micro/8"], channels=1, prediction="x"),
            steps=2400,
            batch_size=64,
            learning_rate=4e-3,
            warmup_steps=50,
            decay="linear",
            betas=(0.9, 0.95),
            label_dropout=0.05,
            time_shift=1.65,
            clip=1.0,
            ema_decay=0.995,
            recompute="none",
            checkpoint_every=500,
            # the last of these steps begins at t = 0.64, before single pixels go wrong (the study digits-sampling)
            sampling=SamplingConfig(steps=8, guidance=3.0, interval=(0.1, 1.0), shift=4.0),
        ),
        "emoji-text-cpu": EMOJI_TEXT,
        # computed scenes of shapes with 7,862 captions; `metrics.scenes` tells whether a sample shows its caption.
        # With the field of the emoji recipe, the loss after 1,000 steps is 0.120 instead of 0.080
        "shapes-text-cpu": dataclasses.replace(
            EMOJI_TEXT,
            data="shapes",
            model=dataclasses.replace(
                EMOJI_TEXT.model,
                field_width=32,
                field_blocks=2,
                encoding="dct",
                weight_norm="fc1+fc2",
                output_norm=True,
            ),
            steps=14_000,
        ),
        # a few-step student of any small teacher, which brings its data and its network: pixnerd train --teacher RUN
        "student-cpu": TrainConfig(
            out="runs/student",
            paths=4096,
            steps=2000,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=20,
            decay="linear",
            betas=(0.9, 0.95),
            label_dropout=0.0,
            clip=1.0,
            ema_decay=0.99,
            recompute="none",
            checkpoint_every=500,
            sampling=STUDENT_SAMPLING,
        ),
        "student-imagenet": STUDENT,
        "student-imagenet-fd": STUDENT_FD,
        "digits-gpu": TrainConfig(
            data="digits",
            model=dataclasses.replace(SIZES["small/8"], channels=1, prediction="x"),
            steps=4000,
            batch_size=256,
            learning_rate=1e-3,
            warmup_steps=200,
            decay="linear",
            betas=(0.9, 0.99),
            clip=1.0,
            ema_decay=0.999,
            checkpoint_every=1000,
            sampling=SamplingConfig(steps=50, guidance=3.0, interval=(0.1, 1.0)),
        ),
    }
)


def cpu_can_compile() -> bool:
    """Whether torch.compile has the C++ compiler that it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; in software that is slower than float32."""
    import torch  # the recipes themselves do not need it

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def quickstart() -> TrainConfig:
    """The digits recipe for this machine: the GPU's or the CPU's, compiled and in bfloat16 if the CPU supports it."""
    from .distributed import default_device

    if default_device().type == "cuda":
        return RECIPES["digits-gpu"]
    return dataclasses.replace(
        RECIPES["digits-cpu"],
        compile="on" if cpu_can_compile() else "off",
        precision="bfloat16" if cpu_has_bfloat16() else "float32",
    )
