import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pixnerd import InputError, ModelConfig, PixNerd, load, load_released
from pixnerd.checkpoints import SHARDS, load_model, load_newest, newest_checkpoint, save_checkpoint, save_model
from pixnerd.distributed import World
from pixnerd.errors import WriteError

from .conftest import SWITCHES, TINY, randomised
from .released_layout import as_released

GOLDEN = "tests/golden/class_p4.ckpt"


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_configuration_survives_saving(tmp_path, switch):
    model = randomised(PixNerd(dataclasses.replace(TINY, **switch), num_classes=5)).eval()
    save_model(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert (again.config, again.num_classes, again.training) == (model.config, 5, False)
    inputs = torch.randn(2, model.config.channels, 16, 16), torch.rand(2), torch.tensor([1, 5])
    assert again(*inputs).equal(model(*inputs))


def checkpoint(folder, step, seed):
    model, ema = (randomised(PixNerd(TINY, 5), s) for s in (seed, seed + 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(1, 3, 16, 16), torch.rand(1), torch.tensor([0])).sum().backward()
    optimizer.step()
    alone = World(0, 1, torch.device("cpu"))
    return save_checkpoint(folder, step, {"model": model, "ema": ema}, optimizer, keep=2, world=alone).result(), ema


def test_checkpoints_are_complete_and_only_the_newest_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (9, 10, 100):
        last, ema = checkpoint(folder, step, seed=step)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-10", "step-100"]
    assert (folder / "latest").read_text() == "step-100\n"
    assert newest_checkpoint(folder) == last
    assert load(tmp_path).patch_embed.weight.equal(ema.patch_embed.weight)
    assert load(last).patch_embed.weight.equal(ema.patch_embed.weight)
    assert not load(tmp_path, weights="model").patch_embed.weight.equal(ema.patch_embed.weight)


def test_damaged_checkpoints_beyond_the_one_that_is_written_do_not_count(tmp_path):
    """The run resumed before them; what it writes is newer."""
    folder = tmp_path / "checkpoints"
    for step in (10, 15):
        checkpoint(folder, step, seed=step)
    (folder / "step-15" / "state.json").unlink()
    checkpoint(folder, 12, seed=12)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-10", "step-12"]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name):
    older, ema = checkpoint(tmp_path / "checkpoints", 5, seed=0)
    newer, _ = checkpoint(tmp_path / "checkpoints", 10, seed=7)
    content = (newer / name).read_bytes()
    (newer / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.warns(UserWarning, match="checkpoint step-10 is skipped"):
        assert newest_checkpoint(tmp_path / "checkpoints") == older
    with pytest.warns(UserWarning, match="step-10"):
        assert load(tmp_path).patch_embed.weight.equal(ema.patch_embed.weight)
    (older / name).unlink()
    with pytest.raises(InputError, match="no checkpoint in .* can be read"), pytest.warns(UserWarning, match="step-10"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["ema-0.9", "projector", "moments"])
def test_a_truncated_file_beyond_the_usual_ones_counts_as_well(tmp_path, name):
    older, _ = checkpoint(tmp_path, 5, seed=0)
    newer, _ = checkpoint(tmp_path, 10, seed=7)
    content = (newer / "ema.safetensors").read_bytes()
    (newer / f"{name}.safetensors").write_bytes(content)
    assert newest_checkpoint(tmp_path) == newer
    (newer / f"{name}.safetensors").write_bytes(content[:-1])
    with pytest.warns(UserWarning, match=rf"step-10 is skipped: .*{name}.safetensors is damaged"):
        assert newest_checkpoint(tmp_path) == older


def test_others_may_read_a_checkpoint_where_new_files_may_be_read(tmp_path):
    (tmp_path / "new").touch()
    written, _ = checkpoint(tmp_path / "checkpoints", 5, seed=0)
    assert {path.stat().st_mode for path in written.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_folder_that_says_another_step_or_is_no_number_is_no_checkpoint(tmp_path):
    older, _ = checkpoint(tmp_path, 5, seed=0)
    newer, _ = checkpoint(tmp_path, 10, seed=7)
    (newer / "state.json").write_text('{"step": 9, "shards": 0}')
    (tmp_path / "step-007").mkdir()
    with pytest.warns(UserWarning, match="step-10 is skipped: .*step-10 is of step 9"):
        assert newest_checkpoint(tmp_path) == older


def test_every_shard_that_a_checkpoint_names_has_to_be_there(tmp_path):
    older, _ = checkpoint(tmp_path, 5, seed=0)
    newer, _ = checkpoint(tmp_path, 10, seed=7)
    (newer / "state.json").write_text('{"step": 10}')  # as it was before there were shards
    assert newest_checkpoint(tmp_path) == newer
    (newer / "state.json").write_text('{"step": 10, "shards": 2}')
    (newer / SHARDS).mkdir()
    shutil.copy(newer / "optimizer.safetensors", newer / SHARDS / "0.safetensors")
    with pytest.warns(UserWarning, match="step-10 is skipped: .*step-10 has 1 of its 2 shards"):
        assert newest_checkpoint(tmp_path) == older


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_disk_that_fills_up_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch, nth):
    folder = tmp_path / "checkpoints"
    checkpoint(folder, 1, seed=1)
    before, written = everything(folder), []

    def save_until_full(*arguments):
        written.append(arguments)
        if len(written) == nth:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(*arguments)

    monkeypatch.setattr("pixnerd.checkpoints.save_tensors", save_until_full)
    with pytest.raises(
        WriteError, match="step-2 cannot be written .*: make room there, and run the same command again"
    ):
        checkpoint(folder, 2, seed=2)
    assert everything(folder) == before
    monkeypatch.undo()
    assert checkpoint(folder, 2, seed=2)[0].name == "step-2"


def test_a_folder_that_cannot_be_tidied_up_does_not_hide_the_full_disk(tmp_path, monkeypatch):
    def save(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def stubborn(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(f"{path} is somebody else's")

    monkeypatch.setattr("pixnerd.checkpoints.save_tensors", save)
    monkeypatch.setattr("pixnerd.checkpoints.shutil.rmtree", stubborn)
    with pytest.raises(WriteError, match="step-2 cannot be written .*: make room there"):
        checkpoint(tmp_path / "checkpoints", 2, seed=2)


def test_a_checkpoint_that_is_retired_while_it_is_read_is_replaced_by_the_newest(tmp_path, monkeypatch):
    """As when `evaluate` loads a model while its run still trains."""
    folder = tmp_path / "run" / "checkpoints"
    checkpoint(folder, 1, seed=1)
    read, newer = [], []

    def read_slowly(path, device):
        read.append(path.parent.name)
        if len(read) == 1:
            newer.append(checkpoint(folder, 2, seed=2)[1])
            shutil.rmtree(folder / "step-1")
        return load_model(path, device)

    monkeypatch.setattr("pixnerd.checkpoints.load_model", read_slowly)
    chosen, model = load_newest(folder, World(0, 1, torch.device("cpu")))
    assert (read, chosen.name) == (["step-1", "step-2"], "step-2")
    assert model.patch_embed.weight.equal(newer[0].patch_embed.weight)
    (folder / "step-2" / "ema.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint in .* can be read"):  # nothing newer comes: no second try
        load(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_loaded_is_tried_twice_and_no_more(tmp_path, monkeypatch):
    folder, tries = tmp_path / "run" / "checkpoints", []
    checkpoint(folder, 1, seed=1)

    def fail(path, device):
        tries.append(path)
        assert len(tries) <= 2
        raise InputError(f"{path} does not fit")

    monkeypatch.setattr("pixnerd.checkpoints.load_model", fail)
    with pytest.raises(InputError, match="does not fit"):
        load_newest(folder, World(0, 1, torch.device("cpu")))
    assert len(tries) == 2


def test_half_written_checkpoints_are_never_seen(tmp_path):
    finished, _ = checkpoint(tmp_path, 5, seed=0)
    (tmp_path / ".partial-step-10").mkdir()
    (tmp_path / ".partial-step-10" / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == finished
    checkpoint(tmp_path, 10, seed=1)  # and do not block the next attempt
    assert not (tmp_path / ".partial-step-10").exists()


def test_what_cannot_be_loaded_is_reported(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nothing")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="has no checkpoint yet"):
        load(tmp_path / "run")
    with pytest.raises(InputError, match=r"ema.safetensors does not exist"):
        load(tmp_path)
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(InputError, match=r"text.safetensors is damaged or not a checkpoint"):
        load(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="holds no PixNerd configuration"):
        load(tmp_path / "foreign.safetensors")


def rewritten(path, change):
    """Change the configuration that a .safetensors file carries."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["pixnerd"])
    change(about)
    save_file(load_file(path), path, {"pixnerd": json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda about: about.pop("config"), "its configuration is not that of a network"),
        (lambda about: about.update(config=[1]), "its configuration is not that of a network"),
        (lambda about: about.update(num_classes=None), "its number of classes is None"),
        (
            lambda about: about.update(num_classes=10**400),
            "is damaged or not a checkpoint: its number of classes is 1000",
        ),
        (lambda about: about.update(num_classes=6), r"label_embed.weight has shape \(6, 24\) and not \(7, 24\)"),
        (lambda about: about["config"].update(blocks=2**40), "blocks is .*; it has to lie between 1 and 1000"),
        (lambda about: about["config"].update(blocks=3), r"does not fit: missing \['blocks.2"),
        (lambda about: about["config"].update(image_size=2**40), "image_size is .*; it has to lie between 1 and 65536"),
        (lambda about: about["config"].update(width=10**400), "model.width"),
        (lambda about: about["config"].update(colour=1), "colour"),
    ],
)
def test_a_damaged_configuration_of_a_file_is_one_sentence(tmp_path, change, sentence):
    path = tmp_path / "model.safetensors"
    save_model(randomised(PixNerd(TINY, num_classes=5)), path)
    rewritten(path, change)
    with pytest.raises(InputError, match=sentence) as refused:
        load(path)
    assert "\n" not in str(refused.value)


def test_released_sizes_are_inferred_from_shapes():
    model = load_released(GOLDEN)
    assert model.num_classes == 10
    assert model.config == ModelConfig(
        width=48,
        heads=2,
        blocks=2,
        patch_size=4,
        image_size=64,
        channels=3,
        field_width=16,
        field_blocks=2,
        field_ratio=2,
    )


def altered(tmp_path, change):
    contents = torch.load(GOLDEN, weights_only=True)
    change(contents["state_dict"])
    torch.save(contents, tmp_path / "altered.ckpt")
    return tmp_path / "altered.ckpt"


def test_released_without_ema_and_with_compiled_names(tmp_path):
    reference = load_released(GOLDEN)

    def compiled(state):
        for key in list(state):
            value = state.pop(key)
            if key.startswith("ema_denoiser."):
                state[key.replace("ema_denoiser.", "denoiser._orig_mod.")] = value
        state["vae.decoder.weight"] = state["diffusion_trainer.x"] = torch.zeros(3)

    model = load_released(altered(tmp_path, compiled))
    assert model.patch_embed.weight.equal(reference.patch_embed.weight)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("ema_denoiser.final_layer.norm.weight"), r"missing \['head.norm.weight'\]"),
        (
            lambda s: s.update({"ema_denoiser.blocks.0.extra.weight": torch.zeros(1)}),
            r"surplus \['blocks.0.extra.weight'\]",
        ),
        (
            lambda s: s.update({"ema_denoiser.final_layer.norm.weight": torch.zeros(3)}),
            r"head.norm.weight has shape \(3,\)",
        ),
        (lambda s: s.clear(), "does not hold PixNerd's weights: param_generator1 is missing"),
        (lambda s: s.update({"ema_denoiser.s_embedder.proj.weight": torch.zeros(())}), "hold PixNerd's weights"),
        (lambda s: s.update({"ema_denoiser.final_layer.linear.weight": torch.zeros(0, 2)}), "hold PixNerd's weights"),
        (lambda s: s.update({"ema_denoiser.blocks.0.mlp.w1.weight": torch.zeros(1, 1, 1)}), "hold PixNerd's weights"),
        (
            lambda s: s.update({"ema_denoiser.final_layer.norm.weight": torch.zeros(16).to_sparse()}),
            "is no tensor of fl",
        ),
        (lambda s: s.update({"ema_denoiser.final_layer.norm.weight": [1.0]}), "final_layer.norm.weight is no tensor"),
        (lambda s: s.update({"ema_denoiser.final_layer.norm.weight": torch.zeros(16).long()}), "is no tensor of float"),
    ],
)
def test_released_checkpoints_that_do_not_fit(tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        load_released(altered(tmp_path, change))


def test_code_in_a_pickle_does_not_run(tmp_path):
    class Malice:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": {"x": Malice()}}, tmp_path / "malice.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Malice()))
    for name in ("malice.ckpt", "plain.ckpt"):
        with pytest.raises(InputError, match="is damaged or not a checkpoint"):
            load_released(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_released_file_is_reported(tmp_path):
    (tmp_path / "short.ckpt").write_bytes(Path(GOLDEN).read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"short.ckpt is damaged"):
        load_released(tmp_path / "short.ckpt")


def test_hub_ids_are_downloaded_and_problems_reported(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: ["README.md", "weights.ckpt"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: {"weights.ckpt": GOLDEN}[name])
    assert load_released("someone/weights").num_classes == 10
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: ["a.ckpt", "b.ckpt"])
    with pytest.raises(InputError, match=r"someone/weights has 2 checkpoints \(a.ckpt, b.ckpt\); name one"):
        load_released("someone/weights")

    def offline(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    with pytest.raises(
        InputError, match="is no file here and could not be fetched from the Hugging Face hub: no route"
    ):
        load_released("someone/weights")


def test_converted_weights_are_the_released_ones(tmp_path):
    from pixnerd.cli import main

    for name in ("class_p4", "text_p4"):
        main(["convert", f"tests/golden/{name}.ckpt", str(tmp_path / f"{name}.safetensors")])
        ours, theirs = load(tmp_path / f"{name}.safetensors"), load_released(f"tests/golden/{name}.ckpt")
        assert ours.config == theirs.config
        assert all(ours.state_dict()[key].equal(tensor) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"field_blocks": 1, "blocks": 3}, {"channels": 1, "patch_size": 8}])
def test_any_class_model_comes_back_from_the_released_layout(tmp_path, changes):
    model = randomised(PixNerd(dataclasses.replace(TINY, **changes), 7))
    torch.save({"state_dict": as_released(model)}, tmp_path / "released.ckpt")
    again = load_released(tmp_path / "released.ckpt")
    assert again.config == dataclasses.replace(model.config, image_size=16 * model.config.patch_size)
    assert again.num_classes == 7
    assert all(again.state_dict()[key].equal(tensor) for key, tensor in model.state_dict().items())
