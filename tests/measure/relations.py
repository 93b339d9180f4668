"""Whether a trained run has learned relations between shapes, and how hard they are to learn from captions.

python -m tests.measure.relations drawn RUN …   how samples arrange the shapes of a caption
python -m tests.measure.relations told RUN …    what the opposite relation in the caption does to the velocity error
python -m tests.measure.relations probe         which of two shapes comes first, read from MiniLM's frozen features

The probe is one block of the text network and one question to its tokens, "is this shape left of, or above, the
other?", trained on the training captions and asked about a tenth of them that it has not seen.
"""

import argparse
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixnerd import data, flow
from pixnerd.conditions import model_conditions
from pixnerd.data.shapes import INVERSE, SHAPES, Scene
from pixnerd.frozen.text_encoder import load_encoder
from pixnerd.layers import Attention, DiTBlock, RMSNorm
from pixnerd.metrics.scenes import find_objects, stands
from pixnerd.model_source import find_model
from pixnerd.sampling import sample_batches
from pixnerd.studies.compare import bootstrap_interval

LENGTH, WIDTH, HEADS = 16, 192, 6  # as in shapes-text-cpu
WARMUP, CLIP = 100, 1.0  # as there; without them 0.002 reads nothing
BATCH, REPORTS = 64, (100, 200, 400, 800)


class Probe(nn.Module):
    """Text features [B, L, F] and shapes [B] → [B], positive where the shape comes first."""

    def __init__(self, features: int):
        super().__init__()
        self.embed, self.norm = nn.Linear(features, WIDTH), RMSNorm(WIDTH)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, WIDTH))
        self.block, self.told = DiTBlock(Attention(WIDTH, HEADS), WIDTH, 4 * WIDTH), nn.Parameter(torch.randn(1, WIDTH))
        self.asked = nn.Embedding(len(SHAPES), WIDTH)
        self.read = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.answer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def forward(self, text: Tensor, shape: Tensor) -> Tensor:
        tokens = self.norm(self.embed(text)) + self.positions
        tokens = self.block(tokens, self.told.expand(len(tokens), -1))
        asked = self.asked(shape)[:, None]
        return self.answer(self.read(asked, tokens, tokens)[0] + asked)[:, 0, 0]


def questions() -> list[tuple[str, int, bool]]:
    """Captions of relations, a shape in each, and whether it comes first; in random order, of each caption once."""
    found = {}
    for scene in data.load("shapes", 32).scenes:
        if scene.relation:
            first = SHAPES.index(scene.groups[scene.relation not in ("left of", "above")].shape)
            second = SHAPES.index(scene.groups[scene.relation in ("left of", "above")].shape)
            for caption in scene.captions:
                asks_first = len(found) % 2 == 0
                found.setdefault(caption, (first if asks_first else second, asks_first))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [(caption, *answer) for caption, answer in found.items()]
    return [rows[index] for index in order]


def probe(layer: int, rate: float) -> Iterator[tuple[int, float]]:
    """Steps of training at a learning rate → share of unseen captions that are read correctly.

    What is read is the encoder's state after so many of its layers, 0: the vectors of its words.
    """
    torch.manual_seed(0)
    rows, encoder = questions(), load_encoder("minilm", LENGTH)
    tokens = encoder.tokenise([caption for caption, _, _ in rows])
    mask = (torch.arange(LENGTH) < tokens.lengths[:, None]).long()
    with torch.no_grad():
        states = encoder.model(input_ids=tokens.ids, attention_mask=mask, output_hidden_states=True).hidden_states
    text = states[layer]  # [n, L, F]
    shapes, is_first = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    model, fitted = Probe(encoder.features), len(rows) * 9 // 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0)
    for step in range(1, REPORTS[-1] + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / WARMUP)
        chosen = torch.randint(fitted, (BATCH,))
        found = model(text[chosen], shapes[chosen])
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(found, is_first[chosen].float()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if step in REPORTS:
            with torch.no_grad():
                right = (model(text[fitted:], shapes[fitted:]) > 0) == is_first[fitted:]
            yield step, float(right.float().mean())


@torch.no_grad()
def told(name: str, count: int = 240) -> Iterator[str]:
    """The velocity error of training scenes told their own caption, and told the opposite relation; a line for each t.

    The differences come from the same images and noise, so that little of one is noise.
    """
    source = find_model(name)
    model = source.load()
    conditions = model_conditions(model, source.config(model), torch.device("cpu"))
    dataset = data.load("shapes", model.config.image_size)
    for task in ("position", "composition"):
        indices = [index for index, scene in enumerate(dataset.scenes) if scene.task == task][:count]
        x, captions = data.to_float(dataset.batch(indices)[0]), [dataset.captions[index][0] for index in indices]
        relations = [dataset.scenes[index].relation for index in indices]
        opposite = [c.replace(relation, INVERSE[relation]) for c, relation in zip(captions, relations, strict=True)]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        for at in (0.02, 0.1, 0.2):
            t = torch.full((len(x),), at)
            x_t = flow.interpolate(x, noise, t)
            own, other = (
                (model(x_t, t, conditions.encode(text)) - (x - noise)).square().mean((1, 2, 3))
                for text in (captions, opposite)
            )
            low, high = bootstrap_interval((other - own).numpy())
            more = f"{(other - own).mean():+.5f} ({low:+.5f} to {high:+.5f})"
            yield f"{name}, {task}, t = {at}: error {own.mean():.4f}, told the opposite {more}"


def drawn(name: str, split: str, count: int = 240) -> str:
    """How samples of the first captions of a position arrange their two shapes, in one line."""
    source = find_model(name)
    model = source.load()
    config = source.config(model)
    conditions = model_conditions(model, config, torch.device("cpu"))
    scenes = data.load(split, model.config.image_size).scenes
    scenes = [scene for scene in scenes if scene.task == "position"][:count]
    text = conditions.encode([scene.captions[0] for scene in scenes])
    batches = sample_batches(model, text, config.sampling, unconditional=conditions.nothing, batch_size=60)
    ways = [way(scene, found) for scene, found in zip(scenes, find_objects(torch.cat(list(batches))), strict=True)]
    shares = [
        f"{ways.count(name)} {name}" for name in ("as asked for", "the other way round", "otherwise", "not drawn")
    ]
    return f"{name}, {split}, {len(scenes)} captions: {', '.join(shares)}"


def way(scene: Scene, found: tuple) -> str:
    """How the objects of an image are arranged, as the caption of a position has it."""
    groups = [[thing for thing in found if thing.shape == group.shape] for group in scene.groups]
    if not all(groups):
        return "not drawn"
    for relation, answer in ((scene.relation, "as asked for"), (INVERSE[scene.relation], "the other way round")):
        if all(stands(a, relation, b) for a in groups[0] for b in groups[1]):
            return answer
    return "otherwise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("probe")
    for command in ("drawn", "told"):
        commands.add_parser(command).add_argument("runs", nargs="+")
    given = parser.parse_args()
    if given.command == "probe":
        for layer, rate in itertools.product((0, 6), (0.0005, 0.002)):
            line = ", ".join(f"{step} steps {share:.0%}" for step, share in probe(layer, rate))
            print(f"layer {layer}, learning rate {rate}: read correctly after {line}", flush=True)
        return
    for name in given.runs:
        lines = (
            told(name) if given.command == "told" else (drawn(name, split) for split in ("shapes", "shapes:held-out"))
        )
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
