"""Damaged pictures, caption files, shards and prepared copies, made from good ones with a seed, through the real doors.

.venv/bin/python -m tests.measure.fuzz_data --cases 1200

Prints how many were read and how many were refused with one sentence; ends with exit code 1 if anything else happened:
another exception, more than a minute for one case, a byte unpickled, or a file of the input changed.
"""

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pixnerd import data
from pixnerd.metrics.images import open_images

from .fuzzing import Use, keeping, mutated, replace_one, run_cases

KINDS = ("picture", "captions", "shard", "prepared")
MODES = {
    "png": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "jpg": ("RGB", "L", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "gif": ("P", "L", "RGB"),
    "bmp": ("RGB", "L", "P", "1"),
    "tiff": ("RGB", "RGBA", "L", "CMYK", "I;16", "F", "I", "LAB", "YCbCr"),
}


def picture(draw: random.Random) -> tuple[str, bytes]:
    """A suffix and a good file: any format and mode, any size up to 40, sometimes with EXIF or several frames."""
    suffix = draw.choice(list(MODES))
    mode = draw.choice(MODES[suffix])
    noise = np.random.default_rng(draw.getrandbits(32))
    shape = (draw.randint(1, 40), draw.randint(1, 40))
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((noise.random(shape) * (1 if mode == "F" else 65535)).astype(kind))
    else:
        image = Image.fromarray(noise.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    options = {}
    if draw.random() < 0.3 and suffix in ("png", "jpg", "webp", "tiff"):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = draw.randint(0, 9), "camera"
        options["exif"] = exif
    if draw.random() < 0.2 and suffix in ("png", "gif", "webp", "tiff") and mode in ("RGB", "L"):
        options |= {"save_all": True, "append_images": [image.rotate(90)]}
    stream = io.BytesIO()
    image.save(stream, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
    return suffix, stream.getvalue()


def read_all(name: str) -> None:
    """Everything that training, `data` and `evaluate` read of a data set."""
    images = data.load(name, 16)
    images.batch(range(len(images)))
    list(images.captions)
    if name.startswith("folder:"):
        for batch in open_images(images.paths[0].parent, 16).batches(2):
            assert batch.shape[1:] == (3, 16, 16)


def picture_case(folder: Path, draw: random.Random) -> Use:
    suffix, content = picture(draw)
    (folder / "class").mkdir()
    for number in range(2):
        (folder / "class" / f"{number}.{suffix}").write_bytes(mutated(content, draw, near=0.3))
    return keeping(folder, lambda: read_all(f"folder:{folder}"))


def captions_case(folder: Path, draw: random.Random) -> Use:
    suffix, content = picture(draw)
    (folder / draw.choice((f"cat.{suffix}", f"CAT.{suffix.upper()}"))).write_bytes(content)
    text = "".join(draw.choice(("a cat", "ein Hörnchen", "\n", "\r\n", "\u2028", " ", "猫")) for _ in range(6))
    (folder / draw.choice(("cat.txt", "CAT.TXT"))).write_bytes(mutated(text.encode(), draw))
    return keeping(folder, lambda: read_all(f"captions:{folder}"))


def shard_case(folder: Path, draw: random.Random) -> Use:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
        ends = draw.choice(((".txt",), (".cls",), (".txt", ".cls", ".json")))
        for number in range(draw.randint(1, 3)):
            suffix, content = picture(draw)
            stem = draw.choice(("", "./", "é" * 90 + "/")) + f"{number:04}"
            content = mutated(content, draw, near=0.3) if draw.random() < 0.2 else content
            beside = {f".{suffix}": content, ".txt": b"a cat\n", ".cls": b"%d" % draw.randint(0, 9), ".json": b"{}"}
            for end in ends if draw.random() < 0.9 else (".txt",):
                beside[end] = mutated(beside[end], draw) if draw.random() < 0.1 else beside[end]
                for name, value in ((f".{suffix}", beside.pop(f".{suffix}", None)), (end, beside[end])):
                    if value is not None:
                        member = tarfile.TarInfo(stem + name)
                        member.size = len(value)
                        tar.addfile(member, io.BytesIO(value))
    content = stream.getvalue()
    (folder / "0.tar").write_bytes(mutated(content, draw, near=0.1) if draw.random() < 0.5 else content)
    return keeping(folder, lambda: read_all(f"shards:{folder}"))


def prepared_case(folder: Path, draw: random.Random) -> Use:
    source, copy = folder / "source", folder / "copy"
    (source / "class").mkdir(parents=True)
    for number in range(2):
        suffix, content = picture(draw)
        (source / "class" / f"{number}.{suffix}").write_bytes(content)
    data.prepare(data.load(f"folder:{source}", 16), "source", copy, workers=0)
    chosen = draw.choice([path for path in sorted(copy.iterdir()) if path.suffix in (".json", ".npy")])
    if chosen.suffix == ".json" and draw.random() < 0.6:
        content = json.loads(chosen.read_text())
        replace_one(content, draw)
        chosen.write_text(json.dumps(content))
    else:
        chosen.write_bytes(mutated(chosen.read_bytes(), draw))

    def use() -> None:
        read_all(f"prepared:{copy}")
        data.load(f"prepared:{copy}", 16).verify()
        if draw.random() < 0.5:
            data.prepare(data.load(f"folder:{source}", 16), "source", copy, workers=0)

    return use


def main() -> None:
    run_cases({kind: globals()[f"{kind}_case"] for kind in KINDS}, 1200)


if __name__ == "__main__":
    main()
