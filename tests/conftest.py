"""What several test files use: small models with random weights everywhere, so that no zero hides a mistake."""

import contextlib
import os
import shutil
import signal
import zlib

import hypothesis
import pytest
import torch

from pixnerd.model import ModelConfig, PixNerd

os.environ.setdefault("MPLBACKEND", "agg")
hypothesis.settings.register_profile("any machine", deadline=None)  # its speed is no property of the code
hypothesis.settings.load_profile("any machine")
# nohup and a shell's & have these ignored, which a program that is started inherits, and a training run respects
signal.signal(signal.SIGHUP, lambda *_: None)
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = ModelConfig(
    width=24, heads=2, blocks=2, patch_size=4, image_size=16, field_width=8, field_blocks=2, field_ratio=2
)
# every ablation switch away from its default, one at a time, and two together
SWITCHES = {
    "as published": {},
    "one field block": {"field_blocks": 1},
    "wide field": {"field_width": 12, "field_ratio": 3},
    "sincos": {"encoding": "sincos"},
    "no coordinates": {"encoding": "none"},
    "no weight norm": {"weight_norm": "none"},
    "fc1 norm": {"weight_norm": "fc1"},
    "no output norm": {"output_norm": False},
    "linear head": {"head": "linear"},
    "image prediction": {"prediction": "x"},
    "grey, patch 8": {"channels": 1, "patch_size": 8},
    "shared field weights": {"field_weights": "shared"},
    "shared weights, wide field": {"field_weights": "shared", "field_width": 12, "field_ratio": 3},
    "no pixels": {"field_pixels": False},
    "no pixels, shared": {"field_pixels": False, "field_weights": "shared"},
    "skip": {"skip": True},
    "skip, linear head": {"skip": True, "head": "linear"},
    "skip, image prediction": {"skip": True, "prediction": "x"},
    "text-to-image field": {"encoding": "sincos", "weight_norm": "fc1", "output_norm": False},
}


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """What a fixture draws is its own, whatever ran before it in this process."""
    torch.manual_seed(zlib.crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """What a test draws is its own, whatever ran before it in this process."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter redrawn: norms around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model


@pytest.fixture
def tiny() -> PixNerd:
    """A small random float32 model with 5 classes, in evaluation mode."""
    return randomised(PixNerd(TINY, num_classes=5)).eval()


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "cat", "dog"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random BERT of 12 features that knows nine words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def pytest_terminal_summary(terminalreporter):
    """At the end of a test run: what every notebook took, in seconds and in units of a fixed piece of work."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = sorted(value for report in reports for name, value in report.user_properties if name == "notebook")
    if rows:
        terminalreporter.section("notebooks at smoke size")
        titles = ("seconds", "processor", "units", "budget", "GiB")
        terminalreporter.write_line(f"{'':24}" + "".join(f"{title:>10}" for title in titles))
        for name, seconds, processor, units, budget, gib in rows:
            over = "   over its budget" * (units > budget)
            line = f"{name:24}{seconds:10.0f}{processor:10.0f}{units:10.1f}{budget:10.0f}{gib:10.2f}{over}"
            terminalreporter.write_line(line)
        seconds, processor = (sum(row[i] for row in rows) for i in (1, 2))
        terminalreporter.write_line(f"{'all':24}{seconds:10.0f}{processor:10.0f}")


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium; playwright's own download is not needed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def offline_page(browser, timeout, permissions=(), **options):
    """A page that can reach nothing, asks for nothing but files, and must not complain; `timeout` in milliseconds."""
    context = browser.new_context(offline=True, **options)
    context.grant_permissions(list(permissions))
    page, said = context.new_page(), []
    page.set_default_timeout(timeout)
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
    yield page
    assert said == []
    context.close()
