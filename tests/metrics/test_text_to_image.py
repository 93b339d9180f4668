"""Prompt files, image folders and scorers' results of the text-to-image benchmarks, in the formats of their scripts."""

import ast
import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pixnerd import InputError, plots
from pixnerd.metrics import text_to_image as benchmarks
from pixnerd.metrics.text_to_image import (
    begin,
    check_images,
    draw,
    load_picture,
    pictures,
    read_prompts,
    read_results,
    results_path,
    scoring_commands,
)
from pixnerd.recipes import RECIPES
from pixnerd.sampling import SamplingConfig, sample_noise

ROOT = Path(__file__).parents[2]
SIZE = (6, 6)
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {"tag": "counting", "include": [{"class": "cow", "count": 4}], "prompt": "a photo of four cows"},
]
DPG = {"partiprompts97": "A tall caf\u00e9,\nwith two doors. \n", "1": "A bench.", "20": "Three cows."}
GENEVAL2 = [
    {"prompt": "four white cows", "atom_count": 2, "skills": ["count", "attribute"]},
    {"prompt": "a dog", "atom_count": 1, "skills": ["object"]},
]
EACH = {"geneval": 4, "dpg": 4, "geneval2": 1}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts_of(benchmark, folder):
    """The prompts above, written to a file and read back."""
    if benchmark == "dpg":
        (folder / "prompts").mkdir(exist_ok=True)
        for name, text in DPG.items():
            (folder / "prompts" / f"{name}.txt").write_text(text)
        return read_prompts("dpg", folder / "prompts")
    rows = {"geneval": GENEVAL, "geneval2": GENEVAL2}[benchmark]
    return read_prompts(benchmark, write_lines(folder / f"{benchmark}.jsonl", rows))


def noise(places, indices):
    """Images that depend on the prompt and on the noise, so a swapped one shows."""
    return sample_noise((3, *SIZE), indices) * 0.4 + torch.tensor(places)[:, None, None, None] * 0.2


def sampled(out, prompts, sample=noise, batch_size=3, settings=None):
    begin(out, prompts, EACH[prompts.benchmark], settings or {"seed": 0})
    return list(draw(out, pictures(prompts, EACH[prompts.benchmark]), sample, batch_size))


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["geneval", "dpg", "geneval2"])
def prompts(request, tmp_path):
    return prompts_of(request.param, tmp_path)


# --- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_are_read_in_order_with_their_complete_lines(tmp_path):
    geneval = prompts_of("geneval", tmp_path)
    assert [entry.name for entry in geneval.entries] == ["00000", "00001", "00002"]
    assert [entry.text for entry in geneval.entries] == [row["prompt"] for row in GENEVAL]
    assert [entry.about for entry in geneval.entries] == GENEVAL
    dpg = prompts_of("dpg", tmp_path)
    assert [(entry.name, entry.text) for entry in dpg.entries] == [
        ("1", "A bench."),
        ("20", "Three cows."),
        ("partiprompts97", "A tall caf\u00e9,\nwith two doors."),
    ]
    assert [entry.about for entry in prompts_of("geneval2", tmp_path).entries] == GENEVAL2


def test_editors_and_file_managers_leave_their_marks(tmp_path):
    content = "".join(json.dumps(row) + "\r\n" for row in GENEVAL) + "\n"
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [entry.about for entry in read_prompts("geneval", tmp_path / "marked.jsonl").entries] == GENEVAL
    dpg = prompts_of("dpg", tmp_path)
    (dpg.path / "._1.txt").write_bytes(b"\x00\xff")
    (dpg.path / "README.md").write_text("prompts")
    assert read_prompts("dpg", dpg.path) == dpg


def test_the_digest_is_what_sha256sum_prints(tmp_path):
    geneval = prompts_of("geneval", tmp_path)
    assert geneval.digest == hashlib.sha256(geneval.path.read_bytes()).hexdigest()[:12]
    dpg = prompts_of("dpg", tmp_path)
    command = "LC_ALL=C sha256sum *.txt | sha256sum"
    if shutil.which("sha256sum"):
        printed = subprocess.run(command, shell=True, cwd=dpg.path, capture_output=True, text=True, check=True).stdout
        assert dpg.digest == printed[:12]
    (dpg.path / "1.txt").rename(dpg.path / "2.txt")  # the same texts under other ids count as other prompts
    assert read_prompts("dpg", dpg.path).digest != dpg.digest


def test_rephrased_prompts_are_told_from_the_original(tmp_path):
    assert prompts_of("geneval", tmp_path).wording == "original"
    rows = [*GENEVAL[:2], {**GENEVAL[2], "prompt": "four brown cows on a green meadow"}]
    assert read_prompts("geneval", write_lines(tmp_path / "long.jsonl", rows)).wording == "not the original"
    assert prompts_of("dpg", tmp_path).wording == "as in the file"


def test_how_much_of_the_benchmark_a_file_holds(prompts):
    whole = {"geneval": "553", "dpg": "1,065", "geneval2": "800"}[prompts.benchmark]
    assert prompts.completeness == f"{len(prompts.entries)} of {whole}"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no prompts"),
        (b'{"prompt": "a dog"}\n', "line 1 has no tag and no include"),
        (b'{"tag": "colors", "include": [], "prompt": "a dog"}\n{"tag"\n', "line 2 is not JSON: '{\"tag\"'"),
        (b'{"tag": "colors", "include": [], "prompt": " "}\n', "line 1: the prompt is ' '; it has to be text"),
        (b"[1]\n", "line 1 has no tag and no include and no prompt"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, content, sentence):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence.replace("[", r"\[")):
        read_prompts("geneval", path)


def test_other_wrong_prompts_are_refused(tmp_path):
    with pytest.raises(InputError, match="'genevil' is unknown; known ones: geneval, dpg, geneval2"):
        read_prompts("genevil", tmp_path)
    with pytest.raises(InputError, match=r"nothing\.jsonl cannot be read"):
        read_prompts("geneval", tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="is not a folder"):
        read_prompts("dpg", write_lines(tmp_path / "file.jsonl", GENEVAL))
    with pytest.raises(InputError, match="'a dog' more than once"):
        read_prompts("geneval2", write_lines(tmp_path / "double.jsonl", [*GENEVAL2, {"prompt": "a dog"}]))
    (tmp_path / "ids").mkdir()
    with pytest.raises(InputError, match="ids holds no prompts"):
        read_prompts("dpg", tmp_path / "ids")
    (tmp_path / "ids" / "1.b.txt").write_text("A bench.")
    with pytest.raises(InputError, match="has a dot in its id"):
        read_prompts("dpg", tmp_path / "ids")


# --- images --------------------------------------------------------------------------------------------------------


def test_geneval_is_laid_out_as_its_script_reads_it(tmp_path):
    out = tmp_path / "out"
    sampled(out, prompts_of("geneval", tmp_path))
    names = {f"{p:05}/samples/{i:04}.png" for p in range(3) for i in range(4)}
    assert files(out / "images").keys() == names | {f"{p:05}/metadata.jsonl" for p in range(3)}
    for place, row in enumerate(GENEVAL):
        assert json.loads((out / "images" / f"{place:05}" / "metadata.jsonl").read_text()) == row
    with Image.open(out / "images/00002/samples/0003.png") as image:
        assert (image.size, image.mode) == (SIZE, "RGB")
        pixels = np.asarray(image)
    expected = ((noise([2], [2003])[0] + 1) * 127.5 + 0.5).clamp(0, 255).floor()
    assert pixels.tolist() == expected.permute(1, 2, 0).to(torch.uint8).tolist()


def test_dpg_is_one_grid_for_each_id_cut_as_its_script_does(tmp_path):
    out, side = tmp_path / "out", SIZE[0]
    sampled(out, prompts_of("dpg", tmp_path))
    assert files(out / "images").keys() == {f"{name}.png" for name in DPG}
    with Image.open(out / "images/20.png") as image:
        assert image.size == (2 * side, 2 * side)
        corners = [(0, 0), (side, 0), (0, side), (side, side)]  # left, top: what the script crops as images 0 … 3
        crops = [np.asarray(image.crop((x, y, x + side, y + side))) for x, y in corners]
    expected = ((noise([1] * 4, [1000, 1001, 1002, 1003]) + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
    assert np.stack(crops).tolist() == expected.permute(0, 2, 3, 1).tolist()
    (picture,) = (picture for picture in pictures(prompts_of("dpg", tmp_path), 4) if picture.path == "20.png")
    assert load_picture(out, picture).equal(expected)


def test_geneval2_has_a_map_from_the_prompt_to_the_picture(tmp_path):
    out, prompts = tmp_path / "out", prompts_of("geneval2", tmp_path)
    sampled(out, prompts)
    paths = json.loads((out / "paths.json").read_text())
    assert list(paths) == [row["prompt"] for row in GENEVAL2]
    for place, path in enumerate(paths.values()):
        expected = ((noise([place], [1000 * place])[0] + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
        assert np.asarray(Image.open(path)).tolist() == expected.permute(1, 2, 0).tolist()


def test_grey_images_become_colour(tmp_path):
    prompts = prompts_of("geneval2", tmp_path)
    sampled(tmp_path / "out", prompts, lambda places, indices: noise(places, indices)[:, :1])
    check_images(tmp_path / "out", prompts, 1, SIZE)


@pytest.mark.parametrize(("benchmark", "each"), [("geneval", 0), ("geneval", 1000), ("dpg", 1), ("geneval2", 4)])
def test_a_wrong_number_of_images_is_refused(tmp_path, benchmark, each):
    with pytest.raises(InputError, match=f"images_per_prompt is {each}; {benchmark} takes"):
        begin(tmp_path / "out", prompts_of(benchmark, tmp_path), each, {})
    assert not (tmp_path / "out").exists()


def test_noise_depends_on_prompt_and_number_alone(tmp_path):
    prompts = prompts_of("geneval", tmp_path)
    few, many = ({p.path: p.noise for p in pictures(prompts, each)} for each in (2, 5))
    assert few.items() <= many.items()
    indices = [index for noise in many.values() for index in noise]
    assert len(set(indices)) == 3 * 5


def test_source_records_what_was_sampled(prompts, tmp_path):
    out, each = tmp_path / "out", EACH[prompts.benchmark]
    source = begin(out, prompts, each, {"seed": 3, "interval": (0.0, 1.0)})
    assert source == json.loads((out / "source.json").read_text())
    assert source == {
        "benchmark": prompts.benchmark,
        "prompts": prompts.path.name,
        "sha256": prompts.digest,
        "wording": prompts.wording,
        "prompt_count": len(prompts.entries),
        "images_per_prompt": each,
        "seed": 3,
        "interval": [0.0, 1.0],
    }
    assert begin(out, prompts, each, {"seed": 3, "interval": (0.0, 1.0)}) == source
    with pytest.raises(InputError, match=r"already holds other images \(seed 3 → 4\): choose another folder"):
        begin(out, prompts, each, {"seed": 4, "interval": (0.0, 1.0)})
    other = read_prompts(prompts.benchmark, prompts.path)
    object.__setattr__(other, "digest", "0" * 12)
    with pytest.raises(InputError, match=f"sha256 {prompts.digest} → {'0' * 12}"):
        begin(out, other, each, {"seed": 3, "interval": (0.0, 1.0)})
    assert json.loads((out / "source.json").read_text()) == source


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_an_interruption_anywhere_changes_nothing(prompts, tmp_path, batch_size):
    def coupled(places, indices):  # as on a GPU, where the rest of the batch decides the last bits
        return noise(places, indices) + 0.02 * sum(indices[:3])

    sampled(tmp_path / "whole", prompts, coupled, batch_size)
    whole, count = files(tmp_path / "whole" / "images"), len(pictures(prompts, EACH[prompts.benchmark]))

    def dying(calls):
        def sample(places, indices):
            if not calls:
                raise KeyboardInterrupt
            calls.pop()
            return coupled(places, indices)

        return sample

    out = tmp_path / "broken"
    for _ in range(count + 1):  # one batch after each start, then the end
        try:
            done = sampled(out, prompts, dying([1]), batch_size)
            break
        except KeyboardInterrupt:
            assert files(out / "images").items() <= whole.items()
    assert done[-1] == count
    assert files(out / "images") == whole
    lost = pictures(prompts, EACH[prompts.benchmark])[-1].path
    (out / "images" / lost).unlink()
    kept = out / "images" / pictures(prompts, EACH[prompts.benchmark])[-2].path
    kept.write_bytes(b"is here")
    sampled(out, prompts, coupled, batch_size)
    assert kept.read_bytes() == b"is here"  # although its batch was sampled again
    kept.write_bytes(whole[kept.relative_to(out / "images").as_posix()])
    assert files(out / "images") == whole


def test_existing_pictures_are_not_sampled_again(prompts, tmp_path):
    sampled(tmp_path / "out", prompts)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}

    def never(places, indices):
        raise AssertionError("sampled again")

    assert sampled(tmp_path / "out", prompts, never)[-1] == len(before)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")} == before


def test_a_picture_has_its_name_only_when_it_is_complete(tmp_path, monkeypatch):
    prompts, out = prompts_of("geneval2", tmp_path), tmp_path / "out"
    original = Image.Image.save

    def torn(image, path, *rest):
        original(image, path, *rest)
        path.write_bytes(path.read_bytes()[:20])
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(InputError, match="no space"):
        sampled(out, prompts)
    assert not list(out.rglob("*.png"))
    monkeypatch.setattr(Image.Image, "save", original)
    sampled(out, prompts)
    check_images(out, prompts, 1, SIZE)
    assert not list(out.rglob(".*"))


@given(batch_size=st.integers(1, 40), each=st.integers(1, 6), count=st.integers(1, 9))
def test_every_batch_is_full_and_every_image_sampled_once(tmp_path_factory, batch_size, each, count):
    folder = tmp_path_factory.mktemp("batches")
    rows = [{"tag": "colors", "include": [], "prompt": f"prompt {i}"} for i in range(count)]
    prompts = read_prompts("geneval", write_lines(folder / "prompts.jsonl", rows))
    seen = []
    begin(folder / "out", prompts, each, {})
    list(
        draw(
            folder / "out",
            pictures(prompts, each),
            lambda places, indices: seen.append(list(zip(places, indices, strict=True))) or noise(places, indices),
            batch_size,
        )
    )
    assert [pair for batch in seen for pair in batch] == [(p, 1000 * p + i) for p in range(count) for i in range(each)]
    assert {len(batch) for batch in seen[:-1]} <= {batch_size}
    assert len(seen[-1]) <= batch_size


def test_a_grid_stays_in_one_batch(tmp_path):
    seen = []
    for batch_size, sizes in [(1, [4, 4, 4]), (7, [4, 4, 4]), (8, [8, 4])]:
        seen.clear()
        out = tmp_path / f"out-{batch_size}"
        sampled(out, prompts_of("dpg", tmp_path), lambda p, i: seen.append(len(i)) or noise(p, i), batch_size)
        assert seen == sizes
    with pytest.raises(InputError, match="batch_size is 0"):
        draw(tmp_path, pictures(prompts_of("dpg", tmp_path), 4), noise, 0)


# --- checks --------------------------------------------------------------------------------------------------------


def test_a_complete_folder_passes(prompts, tmp_path):
    sampled(tmp_path / "out", prompts)
    check_images(tmp_path / "out", prompts, EACH[prompts.benchmark], SIZE)


def spoil(path, how):
    side = Image.open(path).size[0]
    if how == "missing":
        path.unlink()
    elif how == "cannot be read":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "pixels":
        Image.open(path).resize((side + 2, side)).save(path)
    elif how == "blank":
        Image.new("RGB", (side, side), (200, 0, 30)).save(path)  # one colour, though its channels differ


@pytest.mark.parametrize("how", ["missing", "cannot be read", "pixels", "blank"])
def test_a_picture_that_cannot_be_scored_is_named(prompts, tmp_path, how):
    out, each = tmp_path / "out", EACH[prompts.benchmark]
    sampled(out, prompts)
    name = pictures(prompts, each)[1].path
    spoil(out / "images" / name, how)
    with pytest.raises(InputError, match=rf"is not ready to be scored: {name} .*{how}"):
        check_images(out, prompts, each, SIZE)


def test_a_blank_quarter_of_a_grid_is_named(tmp_path):
    out, prompts = tmp_path / "out", prompts_of("dpg", tmp_path)
    sampled(out, prompts)
    with Image.open(out / "images/1.png") as image:
        pixels = np.array(image)
    pixels[6:, :6] = pixels[6:, :6] // 255 + 90  # barely above a colour
    Image.fromarray(pixels).save(out / "images/1.png")
    with pytest.raises(InputError, match=r"scored: 1\.png is blank \(image 2\)$"):
        check_images(out, prompts, 4, SIZE)


def test_blank_means_less_than_a_level_of_contrast(tmp_path):
    prompts, out = prompts_of("geneval2", tmp_path), tmp_path / "out"
    sampled(out, prompts)
    pixels = np.full((6, 6, 3), 128, dtype=np.uint8)
    for step, passes in [(1, False), (3, True)]:  # deviations of 0.5 and 1.5 in one channel
        pixels[::2, :, 2] = 128 + step
        Image.fromarray(pixels).save(out / "images/00001.png")
        if passes:
            check_images(out, prompts, 1, SIZE)
        else:
            with pytest.raises(InputError, match=r"00001\.png is blank$"):
                check_images(out, prompts, 1, SIZE)


def test_the_first_three_of_many_are_named_and_the_rest_counted(tmp_path):
    out, prompts = tmp_path / "out", prompts_of("geneval", tmp_path)
    begin(out, prompts, 4, {})
    with pytest.raises(InputError) as caught:
        check_images(out, prompts, 4, SIZE)
    first = ", ".join(f"00000/samples/000{i}.png is missing" for i in range(3))
    assert str(caught.value) == f"{out / 'images'} is not ready to be scored: {first} and 9 more"


def test_surplus_and_misplaced_files_are_named(tmp_path):
    out, prompts = tmp_path / "out", prompts_of("geneval", tmp_path)
    sampled(out, prompts)
    (out / "images" / ".DS_Store").touch()  # the scorers ignore it
    with pytest.raises(InputError, match=r"00000/samples/0002\.png was not asked for, .* and 3 more"):
        check_images(out, prompts, 2, SIZE)
    write_lines(out / "images/00001/metadata.jsonl", [GENEVAL[0]])
    with pytest.raises(InputError, match=r"scored: 00001/metadata\.jsonl is not the prompt's line$"):
        check_images(out, prompts, 4, SIZE)
    moved, prompts = tmp_path / "moved", prompts_of("geneval2", tmp_path)
    sampled(tmp_path / "there", prompts)
    (tmp_path / "there").rename(moved)
    with pytest.raises(InputError, match=r"paths\.json does not name these pictures"):
        check_images(moved, prompts, 1, SIZE)
    sampled(moved, prompts)  # writes it again
    check_images(moved, prompts, 1, SIZE)


# --- scores --------------------------------------------------------------------------------------------------------


def geneval_results(path, correct, each=4):
    """The output of evaluate_images.py, in arbitrary order: correct[prompt][number]."""
    rows = [
        {
            "filename": f"somewhere/images/{place:05}/samples/{number:04}.png",
            "tag": GENEVAL[place]["tag"],
            "prompt": GENEVAL[place]["prompt"],
            "correct": correct[place][number],
            "reason": "",
            "metadata": json.dumps(GENEVAL[place]),
            "details": "{}",
        }
        for place in range(3)
        for number in range(each)
    ]
    return write_lines(path, rows[5:] + rows[:5])


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=3))
def test_geneval_is_the_mean_of_the_tags(tmp_path_factory, correct):
    folder = tmp_path_factory.mktemp("results")
    scores = read_results(geneval_results(folder / "results.jsonl", correct), prompts_of("geneval", folder), 4)
    single, counting = sum(correct[0]) / 4, sum(correct[1] + correct[2]) / 8
    assert scores.values == pytest.approx(
        {"overall": (single + counting) / 2, "single_object": single, "counting": counting}
    )
    assert list(scores.values) == ["overall", "single_object", "counting"]
    assert scores.images == 12


def test_geneval_tags_stand_as_in_its_papers(tmp_path):
    rows = [{"tag": tag, "include": [], "prompt": "a cow"} for tag in ("strange", "position", "colors")]
    prompts = read_prompts("geneval", write_lines(tmp_path / "tags.jsonl", rows))
    results = [
        {"filename": f"{place:05}/samples/0000.png", **row, "correct": place > 0} for place, row in enumerate(rows)
    ]
    scores = read_results(write_lines(tmp_path / "results.jsonl", results), prompts, 1)
    assert list(scores.values.items()) == [
        ("overall", pytest.approx(2 / 3)),
        ("colors", 1),
        ("position", 1),
        ("strange", 0),
    ]


def test_geneval_of_other_images_is_refused(tmp_path):
    prompts, path = prompts_of("geneval", tmp_path), tmp_path / "results.jsonl"
    right = [[True] * 4] * 3
    rows = [json.loads(line) for line in geneval_results(path, right).read_text().splitlines()]
    for changed, sentence in [
        (rows[:-1], r"lacks 1 of 12 images, the first: 00001/samples/0000\.png"),
        ([*rows, rows[3]], r"has 00002/samples/0000\.png twice"),
        ([{**rows[0], "correct": 0.5}, *rows[1:]], "without a plain true or false"),
        ([{**rows[0], "prompt": "a cow"}, *rows[1:]], r"other images: 00001/samples/0001\.png with the prompt 'a cow'"),
        ([{**rows[0], "filename": "00007/samples/0000.png"}, *rows[1:]], "about other images: 00007"),
        ([{"filename": "00001/samples/0001.png"}], "line 1 has no tag and no prompt and no correct"),
    ]:
        with pytest.raises(InputError, match=sentence):
            read_results(write_lines(path, changed), prompts, 4)
    with pytest.raises(InputError, match="other images"):
        read_results(geneval_results(path, right), prompts, 3)
    with pytest.raises(InputError, match="cannot be read"):
        read_results(tmp_path / "none.jsonl", prompts, 4)


DPG_RESULTS = """images/1.png, 0.5, 1.0, 1.0, 0.5, 0.75
images/partiprompts97.png, 1.0, 1.0, 1.0, 1.0, 1.0
images/20.png, 0.0, 0.0, 1.0, 1.0, 0.5
Model: images
L1 category scores:
	entity: 80.20394949821949
	other: 5e1
L2 category scores:
	entity - whole: 80.76271186440678
	other - count: 46.5
Image path: images
Save results to: results.txt
DPG-Bench score: 75.0
"""


def test_dpg_has_its_last_score_and_its_broad_categories(tmp_path):
    prompts, path = prompts_of("dpg", tmp_path), tmp_path / "results.txt"
    path.write_text(DPG_RESULTS)
    scores = read_results(path, prompts, 4)
    assert scores.values == {"overall": 75.0, "entity": 80.20394949821949, "other": 50.0}
    assert scores.images == 12
    path.write_text(DPG_RESULTS.replace("entity: 8", "entity: 1") + DPG_RESULTS)  # the later of two evaluations
    assert read_results(path, prompts, 4) == scores
    path.write_text("DPG-Bench score: 1.5\nsome noise\n dpg-bench score = 83.25 %\n")
    assert read_results(path, prompts, 4) == benchmarks.Scores({"overall": 83.25}, None)


def test_dpg_says_which_pictures_its_score_leaves_out(tmp_path):
    prompts, path = prompts_of("dpg", tmp_path), tmp_path / "results.txt"
    path.write_text(DPG_RESULTS.partition("\n")[2])
    with pytest.warns(UserWarning, match=r"leaves out 1 of 3 pictures, the first: 1\.png"):
        assert read_results(path, prompts, 4).images == 8
    path.write_text("images/7.png, 1.0, 1.0\n" + DPG_RESULTS)
    with pytest.raises(InputError, match=r"other images: 7\.png"):
        read_results(path, prompts, 4)
    path.write_text("DPG-Bench score: nan\n")
    with pytest.raises(InputError, match="has no line 'DPG-Bench score: NUMBER'"):
        read_results(path, prompts, 4)


def test_geneval2_has_both_means_and_the_skills(tmp_path):
    prompts, path = prompts_of("geneval2", tmp_path), tmp_path / "score_lists.json"
    path.write_text("[[0.25, 1.0], [0.81]]")
    scores = read_results(path, prompts, 1)
    assert scores.values == pytest.approx(
        {
            "Soft-TIFA GM": 100 * (math.sqrt(0.25) + 0.81) / 2,
            "Soft-TIFA AM": 100 * (0.625 + 0.81) / 2,
            "count": 25.0,
            "attribute": 100.0,
            "object": 81.0,
        }
    )
    assert scores.images == 2
    plain = read_prompts("geneval2", write_lines(tmp_path / "plain.jsonl", [{"prompt": "a"}, {"prompt": "b"}]))
    assert list(read_results(path, plain, 1).values) == ["Soft-TIFA GM", "Soft-TIFA AM"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[[0.5, 1.0", "is not JSON"),
        ("{}", "has no lists of scores; there are 2 prompts"),
        ("[[0.5, 1.0]]", "has 1 lists of scores; there are 2 prompts"),
        ("[[0.5], [1.0]]", "the scores of 'four white cows' are"),
        ("[[0.5, 1.0], 1.0]", "the scores of 'a dog' are 1.0"),
        ("[[0.5, NaN], [1.0]]", "the scores of 'four white cows' are"),
        ("[[0.5, -0.1], [1.0]]", "the scores of 'four white cows' are"),
    ],
)
def test_geneval2_of_other_prompts_is_refused(tmp_path, content, sentence):
    (tmp_path / "score_lists.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_results(tmp_path / "score_lists.json", prompts_of("geneval2", tmp_path), 1)


def test_the_commands_name_what_lies_there(prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("an out")  # with a space and not absolute: the commands run elsewhere
    sampled(out, prompts)
    words = [word.strip("()") for command in scoring_commands(out, prompts, 6) for word in shlex.split(command)]
    named = [Path(word) for word in words if word.startswith("/")]
    results = results_path(out, prompts.benchmark).resolve()
    assert results in named
    assert all(path.exists() for path in named if path != results)
    images = {"geneval2": out / "paths.json"}.get(prompts.benchmark, out / "images")
    assert images.resolve() in named


def test_published_scores_are_those_of_the_paper():
    geneval = benchmarks.PUBLISHED["geneval"]
    assert list(geneval) == ["overall", "single_object", "two_object", "counting", "colors", "position", "color_attr"]
    parts = list(geneval.values())[1:]
    assert sum(parts) / 6 == pytest.approx(geneval["overall"], abs=0.01)


def test_bars_stand_at_their_names_and_leave_gaps():
    groups = {"here": {"b": 0.25}, "published": {"a": 0.5, "b": 1.0}}
    (axis,) = plots.compared_bars(groups, ["a", "b"], 1).axes
    bars = sorted((round(bar.get_y() + bar.get_height() / 2, 3), bar.get_width()) for bar in axis.patches)
    assert bars == [(0.2, 0.5), (0.8, 0.25), (1.2, 1.0)]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b"]


# --- the notebook --------------------------------------------------------------------------------------------------


def test_the_notebooks_command_asks_for_the_published_way_of_sampling():
    notebook = nbformat.read(ROOT / "notebooks/scale/evaluate_text_to_image.ipynb", as_version=4)
    (tagged,) = (cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    defaults = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(tagged).body}
    introduction = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    given = yaml.safe_load(re.search(r"-y '\n(.+?)'\n```", introduction, re.DOTALL)[1])
    assert given.keys() <= defaults.keys()
    sampling = {
        field.name: defaults[field.name] for field in dataclasses.fields(SamplingConfig) if field.name != "guide"
    }
    sampling["interval"] = tuple(sampling["interval"])
    for recipe in ("text-256", "text-512", "text-tune"):
        assert SamplingConfig(**sampling) == RECIPES[recipe].sampling
    assert defaults["images_per_prompt"] == EACH[given["benchmark"]]
    assert results_path(Path(given["out"]), given["benchmark"]).as_posix() in introduction
