"""Names of classes: from label to name and back, and what a run keeps of them."""

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd import SIZES, InputError, data
from pixnerd.classes import ClassNames, numbered
from pixnerd.cli import main
from pixnerd.config import TrainConfig
from pixnerd.data.synsets import synsets, words_of
from pixnerd.model_source import find_model
from pixnerd.runs import Run
from pixnerd.training import train

EARLIER = Path(__file__).with_name("made_by_an_earlier_version")
ANIMALS = ["cat", "dog", "great white shark", "Tiger shark", "Dog"]
IMAGENET = ClassNames(synsets(), words_of(synsets()))


def named(*names):
    return ClassNames(names, names)


def test_every_title_and_every_name_leads_back_to_its_label():
    for names in (IMAGENET, named(*ANIMALS), numbered(10)):
        assert len({names.title(label) for label in range(len(names))}) == len(names)
        for label in range(len(names)):
            assert (
                names.label(names.words[label]) == names.label(names.names[label]) == names.label(str(label)) == label
            )


def test_a_title_has_the_number_unless_the_name_is_the_number():
    assert numbered(3).title(2) == "2"
    assert IMAGENET.title(207) == "golden retriever (207)"
    assert named("10", "2", "cat").title(1) == "2 (1)"
    assert named(os.fsdecode(b"caf\xe9")).title(0) == "caf\\udce9 (0)"


def test_case_does_not_matter_unless_it_decides():
    names = named(*ANIMALS)
    assert [names.label(asked) for asked in ("CAT", "great White Shark", "dog", "Dog")] == [0, 2, 1, 4]
    with pytest.raises(InputError, match=r"^class 'DOG' is ambiguous \(dog \(1\); Dog \(4\)\): give its number$"):
        names.label("DOG")


def test_a_name_of_two_classes_is_ambiguous_and_both_are_told_apart():
    names = ClassNames(["n1", "n2", "n3"], ["crane", "drake", "crane"])
    assert (names.label("drake"), names.label("n3")) == (1, 2)
    with pytest.raises(InputError, match=r"^class 'crane' is ambiguous \(crane \(0\), n1; crane \(2\), n3\): give its"):
        names.label("crane")


@pytest.mark.parametrize(
    ("names", "asked", "sentence"),
    [
        (named(*ANIMALS), "shark", r"near it: great white shark \(2\); Tiger shark \(3\)"),
        (named(*ANIMALS), "tigre shark", r"near it: Tiger shark \(3\); great white shark \(2\)"),
        (named(*ANIMALS), "xyz", r"there are cat \(0\); dog \(1\); great white shark \(2\); .*Dog \(4\)"),
        (IMAGENET, "golden retreiver", r"near it: golden retriever \(207\), n02099601; "),
        (IMAGENET, "", r"there are tench \(0\), n01440764; .*; …"),
        (numbered(10), "cat", "these classes have no names: give a number, 0 … 9"),
        (numbered(10), "9" * 5000, "these classes have no names: give a number, 0 … 9"),
    ],
)
def test_an_unknown_name_is_one_sentence_with_near_misses(names, asked, sentence):
    with pytest.raises(InputError, match=f"^class '{asked}' is unknown; {sentence}"):
        names.label(asked)


def test_a_number_is_the_label_whatever_the_names():
    names = named("10", "2", "3")
    with pytest.warns(UserWarning, match="2 is taken as a label; the class of that name is label 1"):
        assert names.label("2") == 2
    with pytest.raises(InputError, match="label 10 is outside 0 … 3 .*; the class of that name is label 0"):
        names.label("10")
    with pytest.raises(InputError, match=r"label -1 is outside 0 … 3 \(3 itself means no label\)$"):
        names.label("-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [numbered(10).label("7"), named("1", "1", "2").label("1"), names.label("0")] == [7, 1, 0]


# --- a run -----------------------------------------------------------------------------------------------------------


def folder_of(path, *names):
    for name in names:
        (path / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(path / name / "0.png")
    return path


def trained(out, name):
    options = {"model": dataclasses.replace(SIZES["nano/8"], image_size=16), "batch_size": 2, "compile": "off"}
    config = TrainConfig(out=str(out), data=name, steps=1, **options)
    list(train(config, torch.device("cpu")))
    return config


@pytest.fixture
def run(tmp_path):
    """A run on a folder of two of ImageNet's classes and one of its own, whose data is gone."""
    folder_of(tmp_path / "data", "n02099601", "n01440764", "my cats")
    trained(tmp_path / "run", f"folder:{tmp_path / 'data'}")
    shutil.rmtree(tmp_path / "data")
    return Run(tmp_path / "run")


def test_a_run_keeps_names_and_words_without_its_data(run):
    assert json.loads(run.classes_path.read_text()) == {
        "classes": ["my cats", "n01440764", "n02099601"],
        "words": ["my cats", "tench", "golden retriever"],
    }
    names = find_model(run.folder / "checkpoints" / "step-1").class_names(find_model(run.folder).load())
    assert names == ClassNames(["my cats", "n01440764", "n02099601"], ["my cats", "tench", "golden retriever"])


def test_a_prepared_copy_keeps_the_names_and_so_do_its_runs(tmp_path):
    folder_of(tmp_path / "data", "n02099601", "cats")
    data.prepare(data.load(f"folder:{tmp_path / 'data'}", 16), "folder:data", tmp_path / "copy", 0)
    trained(tmp_path / "run", f"prepared:{tmp_path / 'copy'}")
    assert Run(tmp_path / "run").class_names() == ClassNames(["cats", "n02099601"], ["cats", "golden retriever"])


def test_sample_takes_names_ids_and_numbers(run, tmp_path, capsys):
    labels = ["Golden Retriever", "n01440764", "0"]
    main(["sample", str(run.folder), "--labels", *labels, "--count", "6", "--steps", "1", "--out", str(tmp_path)])
    with np.load(tmp_path / "samples.npz") as file:
        assert file["labels"].tolist() == [2, 2, 1, 1, 0, 0]
    with pytest.raises(SystemExit, match="2"):
        main(["sample", str(run.folder), "--labels", "golden retreiver"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "pixnerd: class 'golden retreiver' is unknown; near it: golden retriever (2), n02099601"


def test_a_folder_whose_classes_changed_is_refused_and_the_names_stay(tmp_path):
    folder = folder_of(tmp_path / "data", "cats", "dogs")
    config = trained(tmp_path / "run", f"folder:{folder}")
    kept = Run(tmp_path / "run").classes_path.read_text()
    (folder / "cats").rename(folder / "hens")
    with pytest.raises(InputError, match="its data had label 0 for 'cats', now it is 'dogs'"):
        train(dataclasses.replace(config, steps=2), torch.device("cpu"))
    assert Run(tmp_path / "run").classes_path.read_text() == kept


def test_a_run_that_kept_no_names_has_numbers(tmp_path):
    run = Run(shutil.copytree(EARLIER, tmp_path / "run"))
    main(["sample", str(run.folder), "--labels", "3", "--count", "1", "--steps", "1"])
    assert run.load_samples()[1].tolist() == [3]
    with pytest.raises(SystemExit, match="2"):
        main(["sample", str(run.folder), "--labels", "three"])
    run.classes_path.write_text(json.dumps({"classes": [f"kind {label}" for label in range(10)]}))  # before words
    assert run.class_names().title(3) == "kind 3 (3)"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"classes": 3}, "holds no list of classes"),
        ({"classes": ["a"] * 3, "words": ["a", "b", 3]}, "holds no list of words"),
        ({"classes": ["a"] * 3, "words": ["a", "b"]}, "has 2 words for 3 classes"),
        ({"classes": ["a", "b"]}, "names 2 classes; the model of .* has 3"),
    ],
)
def test_damaged_names_are_one_sentence(run, content, sentence):
    run.classes_path.write_text(json.dumps(content))
    source = find_model(run.folder)
    with pytest.raises(InputError, match=rf"classes.json {sentence}"):
        source.class_names(source.load())


def test_weights_without_a_run_have_imagenets_names_if_they_have_as_many_classes(run, tmp_path):
    path = tmp_path / "alone.safetensors"
    shutil.copy(find_model(run.folder).file(), path)
    source = find_model(path)
    model = source.load()
    assert source.class_names(model) is None
    model.num_classes = 1000
    assert source.class_names(model).title(207) == "golden retriever (207)"
    model.num_classes = None
    assert source.class_names(model) is None
