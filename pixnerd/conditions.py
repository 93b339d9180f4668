"""What a model is told about an image: its label, one of its captions, or nothing.

`Labels` and `Captions` share the interface `Conditions`, the only place outside the networks where the two families of
models differ: training, sampling, evaluation and the panels use it without asking which one they have.
Dimension letters: B images, K captions of an image at most, L tokens of a caption, F features of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import data
from .classes import ClassNames, numbered
from .config import TrainConfig
from .data import ImageDataset
from .errors import InputError
from .frozen.text_encoder import CachedEncoder, TextEncoder, Tokenizer, Tokens, TransformersEncoder, load_encoder
from .model import PatchDenoiser
from .model_config import TextModelConfig

Subject = int | str  # what an image is asked to show: a class, or a caption


class ImageTokens(NamedTuple):
    """Every caption of some images, as an encoder reads them."""

    ids: Tensor  # [B, K, L] int64
    lengths: Tensor  # [B, K] int64, before a caption was cut to L
    counts: Tensor  # [B] int64, captions of each image, 1 … K


@dataclass(frozen=True)
class CaptionTokenizer:
    """Tokenises the captions of training images, in the loader's workers."""

    tokenizer: Tokenizer
    captions: Sequence[tuple[str, ...]]  # those of every training image

    def __call__(self, indices: Sequence[int]) -> ImageTokens:
        """All captions of the images at these indices: choosing one is left to the device, where the choice is."""
        texts = [self.captions[index] for index in indices]
        counts = torch.tensor([len(captions) for captions in texts])
        most = int(counts.max())
        padded = [caption for captions in texts for caption in (*captions, *[""] * (most - len(captions)))]
        ids, lengths = self.tokenizer(padded)
        return ImageTokens(ids.view(len(texts), most, -1), lengths.view(len(texts), most), counts)


class Conditions(Protocol):
    """What one kind of model is told."""

    subject: str
    """how an image is requested: by its "class" or by a "prompt" """
    reader: str
    """what makes the model's input of a subject: "labels", or the text encoder's name and content"""
    num_classes: int | None
    """the network's number of classes; None if it is told captions"""
    names: ClassNames | None
    """what the classes are called; None if it is told captions"""
    nothing: Tensor
    """what stands for no label or no caption, for guidance: [] or [L, F]"""
    tokenizer: CaptionTokenizer | None
    """what the loader's workers make of an image's captions; None if they need not"""

    def encode(self, subjects: Sequence[Subject]) -> Tensor:
        """The model's input [B, …] for B classes or captions. Raises InputError for subjects of the other kind."""

    def of_images(
        self, labels: Tensor, indices: Tensor, dropped: Tensor, choice: Tensor, tokens: ImageTokens | None = None
    ) -> Tensor:
        """The model's input [B, …] for training images.

        Args:
            labels: [B], of the images.
            indices: [B], of the images in the data set.
            dropped: [B] bool, which images are shown without label or caption.
            choice: [B] in [0, 1), which of an image's captions is shown.
            tokens: what `tokenizer` made of the images' captions, on the CPU.
        """

    def asked_for(self, labels: Sequence[str], prompts: Sequence[str], source: str) -> Sequence[Subject]:
        """What a user requests from `source`, by prompts or by labels, numbers or names; no labels means all classes.

        Raises InputError.
        """

    def subjects(self, reference: str, image_size: int) -> Sequence[Subject]:
        """What an evaluation samples: every class, or the plainest caption of each image in the data set `reference`.

        Raises InputError when captions are needed and `reference` has none.
        """


class Labels:
    """Class labels; num_classes itself stands for "no label".

    Args:
        names: what the labels mean, if it is known.
    """

    subject, reader = "class", "labels"
    tokenizer = None

    def __init__(self, num_classes: int, names: ClassNames | None = None):
        self.num_classes, self.names = num_classes, names or numbered(num_classes)
        self.nothing = torch.tensor(num_classes)

    def encode(self, subjects: Sequence[Subject]) -> Tensor:
        """[B]"""
        if any(isinstance(subject, str) for subject in subjects):
            raise InputError(
                f"prompt {subjects[0]!r} cannot be shown: this is a class-conditional model, it takes labels"
            )
        return torch.as_tensor(subjects, dtype=torch.long)

    def of_images(
        self, labels: Tensor, indices: Tensor, dropped: Tensor, choice: Tensor, tokens: ImageTokens | None = None
    ) -> Tensor:
        """[B]"""
        return labels.masked_fill(dropped, self.num_classes)

    def asked_for(self, labels: Sequence[str], prompts: Sequence[str], source: str) -> Sequence[int]:
        if prompts:
            raise InputError(f"{source} has a class-conditional model: it takes --labels")
        return [self.names.label(label) for label in labels] or range(self.num_classes)

    def subjects(self, reference: str, image_size: int) -> Sequence[int]:
        return range(self.num_classes)


class Captions:
    """Captions, read by a frozen encoder; the empty caption stands for "no caption".

    Args:
        encode: the encoder.
        captions: those of every training image.
    """

    subject = "prompt"
    num_classes = names = None

    def __init__(self, encode: TextEncoder, captions: Sequence[tuple[str, ...]] = ()):
        self.encode_text, self.captions = encode, captions
        self.reader = f"{encode.name} {encode.content}".strip()
        self.tokenizer = None
        if isinstance(encode, TransformersEncoder):  # a cached one is asked for whole captions
            self.tokenizer = CaptionTokenizer(encode.tokenise, captions)
            self._no_caption = encode.tokenise([""])

    @property
    def nothing(self) -> Tensor:
        """[L, F]"""
        return self.encode_text([""])[0]

    def encode(self, subjects: Sequence[Subject]) -> Tensor:
        """[B, L, F]"""
        if not all(isinstance(subject, str) for subject in subjects):
            raise InputError(f"class {subjects[0]} cannot be shown: this is a text model, it takes prompts")
        return self.encode_text(list(subjects))

    def of_images(
        self, labels: Tensor, indices: Tensor, dropped: Tensor, choice: Tensor, tokens: ImageTokens | None = None
    ) -> Tensor:
        """[B, L, F]"""
        if tokens is not None:
            return self._of_tokens(tokens, dropped, choice)
        shown = []
        for index, share, drop in zip(indices.tolist(), choice.tolist(), dropped.tolist(), strict=True):
            captions = self.captions[index]
            shown.append("" if drop else captions[int(share * len(captions))])
        return self.encode_text(shown).to(choice.device)

    def _of_tokens(self, tokens: ImageTokens, dropped: Tensor, choice: Tensor) -> Tensor:
        """[B, L, F], without making the host wait for a GPU."""
        ids, lengths, counts = (tensor.to(choice.device, non_blocking=True) for tensor in tokens)
        no_ids, no_length = (tensor.to(choice.device, non_blocking=True) for tensor in self._no_caption)
        images = torch.arange(len(counts), device=choice.device)
        which = (choice.double() * counts).long()  # [B]
        ids = torch.where(dropped[:, None], no_ids, ids[images, which])
        return self.encode_text.encode(Tokens(ids, torch.where(dropped, no_length, lengths[images, which])))

    def warn_of_cut(self, indices: Tensor, tokens: ImageTokens) -> None:
        """Warn once if a caption is cut; indices [B] and tokens on the CPU."""
        for row, column in (tokens.lengths > self.encode_text.length).nonzero()[:1].tolist():
            self.encode_text.warn(self.captions[int(indices[row])][column], int(tokens.lengths[row, column]))

    def asked_for(self, labels: Sequence[str], prompts: Sequence[str], source: str) -> Sequence[str]:
        if not prompts or labels:
            raise InputError(f"{source} has a text model: it takes --prompts")
        return prompts

    def subjects(self, reference: str, image_size: int) -> Sequence[str]:
        captions = [plainest for plainest, *_ in data.load(reference, image_size).captions]
        if not captions:
            raise InputError(f"a text model samples captions, and {reference!r} has none: choose another --reference")
        return captions


def training_conditions(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> Conditions:
    """What a training run's model is told about its images. Raises InputError if captions or encoder are missing."""
    if not isinstance(config.model, TextModelConfig):
        return Labels(dataset.num_classes)
    if not dataset.captions:
        raise InputError(f"data set {config.data!r} has no captions; a text model needs them")
    return Captions(caption_encoder(config, device), dataset.captions)


def model_conditions(
    model: PatchDenoiser, config: TrainConfig, device: torch.device, names: ClassNames | None = None
) -> Conditions:
    """What a trained model is told; its run's `config` says with which encoder, `names` what its classes are called.

    Raises InputError if the encoder is missing.
    """
    if model.num_classes is not None:
        return Labels(model.num_classes, names)
    return Captions(caption_encoder(config, device))


def caption_encoder(config: TrainConfig, device: torch.device) -> TextEncoder:
    """A text run's frozen encoder, with its features cached under data/text if the run caches them.

    Raises:
        InputError: the encoder is missing, or its features do not have the width that the model reads.
    """
    encoder = load_encoder(config.text_encoder, config.model.text_length, device)
    if encoder.features != config.model.text_features:
        raise InputError(
            f"text encoder {config.text_encoder} gives {encoder.features} features per token; "
            f"the model reads {config.model.text_features} (model.text_features)"
        )
    return CachedEncoder(encoder, data.cache_folder() / "text") if config.cache_text else encoder
