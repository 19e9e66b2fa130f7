"""The manifest, box text, images, sampling and the phantom."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import data
import losses
import metrics
from conftest import ROOT, run
from metrics import InputError

ROW = {"image": "a.png", "study": "s", "patient": "p", "split": "train", "report": "Clear lungs.",
       "regions": [{"phrase": "The heart.", "boxes": [[0.3, 0.5, 0.7, 0.8]]}]}


def write(folder, *rows, image=True):
    """A manifest of rows (dicts or raw lines) with one image."""
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    if image:
        Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(folder / "a.png")
    return folder


# ---- boxes as text -------------------------------------------------------------------------------

def test_boxes_round_trip():
    """Guards: a lost axis order, a rounding that empties a box, an order that depends on the
    input's."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        low = rng.uniform(0, 0.999, (rng.integers(0, 4), 2))
        boxes = np.concatenate([low, low + rng.uniform(0, 1, low.shape) * (1 - low)], 1).tolist()
        text = data.boxes_to_text(boxes)
        back, malformed = data.text_to_boxes(text)
        assert not malformed and len(back) == len(boxes)
        expected = sorted(np.round(boxes, 3).tolist())
        assert np.allclose(expected, back, atol=0.0011) if boxes else back == []
        assert text == data.boxes_to_text(boxes[::-1]) == data.boxes_to_text(back)


def test_box_text_is_what_the_model_learns():
    """Guards: y before x, floats, another scale."""
    text = data.boxes_to_text([[0.5, 0.25, 1, 0.75], [0.1, 0.2, 0.3, 0.4]])
    assert text == "100 200 300 400; 500 250 1000 750"
    assert data.boxes_to_text([]) == "none"
    assert data.boxes_to_text([[1 - 1e-9, 0, 1, 1e-9]]) == "999 0 1000 1"


@pytest.mark.parametrize("text", [
    "", "1 2 3", "1 2 3 4 5", "300 0 100 50", "0 0 1001 5", "a b c d", "1,2,3,4", "-1 2 3 4",
    "1 2 3 4;", "nan 0 1 2", "١ ٢ ٣ ٤", "1 2 3 4; none", "10 10 10 20",
    "99999999999999999999 0 1 1"])
def test_malformed_box_text_gives_no_boxes_and_says_so(text):
    """Guards: an exception, or half an answer, from what a language model may write."""
    assert data.text_to_boxes(text) == ([], True)


def test_no_boxes_is_an_answer():
    """Guards: "none" counted as malformed."""
    assert data.text_to_boxes("none") == ([], False)


# ---- the manifest --------------------------------------------------------------------------------

def test_manifest_is_read_by_folder_and_by_file(tmp_path):
    """Guards: paths relative to the working directory; a byte order mark or a null in the way."""
    folder = write(tmp_path / "d", "\ufeff" + json.dumps(ROW), "",
                   {**ROW, "split": "test", "report": None, "regions": None})
    for path in (folder, folder / "manifest.jsonl"):
        rows = data.read_manifest(path)
        assert [row["split"] for row in rows] == ["train", "test"]
        assert rows[0]["path"] == str(folder / "a.png")
        assert rows[1]["regions"] == [] and rows[1]["report"] == ""
    assert len(data.read_manifest(folder, "test")) == 1


WRONG = [({"split": "validation"}, "expected one of train, val, test"),
         ({"image": "b.png"}, "does not exist"), ({"study": 5}, "'study' is 5"),
         ({"report": 7}, "'report' is 7"), ({"regions": {}}, "'regions'")]
WRONG_BOXES = [([10, 20, 300, 400], "pixels"), ([0.5, 0.1, 0.2, 0.3], "corners are expected"),
               ([0, 0, 1.2, 1], "leaves"), ([0.1, 0.1, float("nan"), 0.2], "not finite"),
               ([0.1, 0.2, 0.3], "4 numbers"), (["0", 0, 1, 1], "4 numbers"),
               ([0, 0, 10 ** 400, 1], "pixels")]
WRONG += [({"regions": [{"phrase": "x", "boxes": [box]}]}, words) for box, words in WRONG_BOXES]
WRONG += [({"regions": [{"phrase": "", "boxes": []}]}, "phrase"),
          ({"image": "a" * 5000}, "cannot be looked up"),
          ({"report": "half a pair: \ud83d"}, "surrogates")]


@pytest.mark.parametrize("change, words", WRONG)
def test_a_wrong_row_stops_with_file_line_and_reason(tmp_path, change, words):
    """Guards: a week of training on pixels or on xywh; an error that does not say where."""
    folder = write(tmp_path / "d", ROW, {**ROW, **change})
    with pytest.raises(InputError) as error:
        data.read_manifest(folder)
    assert f"{folder / 'manifest.jsonl'}:2: " in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_manifest_is_said(tmp_path):
    """Guards: a traceback for a wrong path, broken JSON, an absent split."""
    for make, words in ((lambda: tmp_path / "none", "no such file"),
                        (lambda: write(tmp_path / "a", "{broken"), "one JSON object a line"),
                        (lambda: write(tmp_path / "b", "", "[", json.dumps(ROW), "]"),
                         ":2: expected one JSON object a line"),
                        (lambda: write(tmp_path / "g", "1"), "object a line, got int"),
                        (lambda: write(tmp_path / "e", '{"a":' + "[" * 10 ** 5), "one JSON object"),
                        (lambda: write(tmp_path / "f", "9" * 5000), "one JSON object a line"),
                        (lambda: write(tmp_path / "c", {**ROW, "split": "test"}),
                         "no rows with split 'train'")):
        with pytest.raises(InputError, match=words):
            data.read_manifest(make(), "train")


def test_a_wrong_byte_is_named_with_its_line(tmp_path):
    """Guards: a byte offset into a file of a gigabyte as the only hint; a stop of the check."""
    folder = write(tmp_path / "d", ROW, {**ROW, "report": "REPORT"}, ROW)
    raw = (folder / "manifest.jsonl").read_bytes()
    (folder / "manifest.jsonl").write_bytes(raw.replace(b"REPORT", b"caf\xe9"))
    problems = [problem for *_, problem in data.scan_manifest(folder)]
    assert problems[::2] == [None, None] and "in UTF-8" in problems[1]
    with pytest.raises(InputError, match=":2: .*utf-8.* decode byte 0xe9"):
        data.read_manifest(folder)


def test_boxes_without_area_are_dropped(tmp_path):
    """Guards: a box of 1e-300 that divides by zero in a score, or a region lost with it."""
    boxes = [[0, 0, 1e-300, 1e-300], [0.1, 0.1, 0.2, 0.2]]
    folder = write(tmp_path / "d", {**ROW, "regions": [{"phrase": "x", "boxes": boxes}]})
    assert data.read_manifest(folder)[0]["regions"] == [{"phrase": "x", "boxes": boxes[1:]}]


def test_find_row_knows_an_image_by_path_link_and_bytes(tmp_path):
    """Guards: a copy of a pool image that is shown itself as a demonstration; another image of the
    same size taken for it."""
    folder = write(tmp_path / "d", ROW, {**ROW, "image": "b.png"}, image=False)
    for name, value in (("a.png", b"1234"), ("b.png", b"1235"), ("copy.png", b"1235"),
                        ("other.png", b"1236")):
        (folder / name).write_bytes(value)
    (folder / "link.png").symlink_to("a.png")
    rows = data.read_manifest(folder)
    found = [data.find_row(rows, folder / name) for name in ("a.png", "link.png", "copy.png")]
    assert [row["image"] for row in found] == ["a.png", "a.png", "b.png"]
    assert data.find_row(rows, folder / "other.png") is None


def test_notes_say_what_is_odd(tmp_path):
    """Guards: a misspelt key, a repeated row or a shared patient that nobody hears of; notes on a
    set that is as it should be."""
    val, test = ({**ROW, "patient": split, "split": split, "image": split} for split in
                 ("val", "test"))
    assert data.manifest_notes([ROW, val, test]) == []
    odd = {"image": "b", "study": "s", "patient": "p", "split": "test", "reports": "Clear."}
    region = {"phrase": "x", "boxes": [[0, 0, 1e-9, 1]], "label": 1}
    notes = data.manifest_notes([ROW, ROW, odd, {**ROW, "image": "c", "regions": [region]}])
    for words in ("rows repeated word for word: 1", "rows whose image another row has: 1",
                  "neither report nor regions: 1", "almost no area, dropped when read: 1",
                  "unknown key 'reports', not read: 1; is 'report' meant?", "unknown key 'label'",
                  "no rows of split 'val'",
                  "in train and in test, so scores mislead: 1, such as 'p'"):
        assert any(words in note for note in notes), words
    assert len(notes) == 8 and not any("\n" in note for note in notes)


@pytest.mark.parametrize("png", ["a.png", "manifest.jsonl", "link.png"])
def test_check_does_not_draw_over_its_inputs(tmp_path, png):
    """Guards: an image or the manifest replaced by the sheet, through a link too."""
    folder = write(tmp_path / "d", ROW)
    (folder / "link.png").symlink_to("a.png")
    before = (folder / png).read_bytes()
    said = run("data.py", "check", folder, "--png", folder / png, ok=False)
    assert "is an input of this command" in said and (folder / png).read_bytes() == before


def test_check_does_not_draw_over_the_image_of_a_wrong_row(tmp_path):
    """Guards: an image lost because its row has a mistake."""
    folder = write(tmp_path / "d", {**ROW, "split": "none"}, {**ROW, "image": "a" * 5000})
    before = (folder / "a.png").read_bytes()
    with pytest.raises(InputError, match="is an input of this command"):
        data.check(folder, folder / "a.png")
    assert (folder / "a.png").read_bytes() == before


def test_an_empty_argument_is_said(tmp_path):
    """Guards: a variable of the shell that is not set, taken for a flag that is not given."""
    assert "an argument is empty" in run("data.py", "phantom", "", ok=False)
    assert "an argument is empty" in run("train.py", "--data", "", cwd=ROOT, ok=False)


def test_check_notes_images_of_one_grey_value_and_twins(tmp_path, capsys):
    """Guards: black images, or the same one under two names, that pass the check unnoticed."""
    names = ("a.png", "b.png", "c.png")
    folder = write(tmp_path / "d", *({**ROW, "image": name} for name in names))
    Image.new("L", (9, 9), 7).save(folder / "b.png")
    Image.open(folder / "a.png").save(folder / "c.png")
    assert data.check(folder, tmp_path / "sheet.png") == 0
    printed = capsys.readouterr().out
    assert "single grey value: 1" in printed and "the same as another row's: 1" in printed


def test_check_command_reports_all_problems_and_draws(tmp_path):
    """Guards: stopping at the first problem; passing a data set with an unreadable image."""
    folder = write(tmp_path / "d", ROW, {**ROW, "split": "x"}, "{", {**ROW, "image": "bad.png"})
    (folder / "bad.png").write_bytes(b"not an image")
    png = tmp_path / "sheet.png"
    done = subprocess.run([sys.executable, "data.py", "check", folder, "--png", png], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [f"manifest.jsonl:{line}: " for line in (2, 3, 4)]
    for words in (*lines, "3 problems in 4"):
        assert words in done.stdout
    assert Image.open(png).size == (320, 320)
    assert "0 problems in 1 rows" in run("data.py", "check", write(tmp_path / "good", ROW),
                                         "--png", png)


# ---- images --------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK"])
def test_every_mode_becomes_the_same_image(tmp_path, mode):
    """Guards: 16-bit divided by 256 (black images), inverted palette indices for grey levels."""
    if mode == "I;16":
        image = Image.fromarray((RAMP * 3000 + 500).astype(np.uint16))
    elif mode in ("I", "F"):
        image = Image.fromarray((RAMP * 3000 - 200).astype(np.int32 if mode == "I" else np.float32))
    else:
        image = Image.fromarray((RAMP * 255).astype(np.uint8)).convert(mode)
    path = tmp_path / ("image.tif" if mode in ("I", "F", "CMYK") else "image.png")
    image.save(path)
    image = np.asarray(data.load_image(path, 32), float) / 255
    assert image.shape == (32, 32)
    expected = np.asarray(Image.fromarray(RAMP.astype(np.float32))
                        .resize((32, 32), Image.Resampling.BILINEAR))
    tolerance = 0.35 if mode == "1" else 0.03          # one bit is dithered
    assert abs(image - expected).max() < tolerance


def test_narrow_and_constant_images(tmp_path):
    """Guards: a grey image that uses 30 of 256 levels left flat; a division by zero on a blank
    one."""
    Image.fromarray((RAMP * 30 + 100).astype(np.uint8)).save(tmp_path / "narrow.png")
    image = np.asarray(data.load_image(tmp_path / "narrow.png"))
    assert image.min() == 0 and image.max() == 255
    Image.fromarray(np.full((9, 9), 1000, np.uint16)).save(tmp_path / "blank.png")
    assert np.asarray(data.load_image(tmp_path / "blank.png")).std() == 0


def test_transparent_is_black(tmp_path):
    """Guards: the colour hidden under transparent padding."""
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert np.asarray(data.load_image(tmp_path / "image.png"))[:, 0].tolist() == [0] * 4 + [255] * 4


def test_unreadable_images_name_their_path(tmp_path):
    """Guards: a truncated JPEG read as a half-grey image; a traceback; a bomb that fills the
    memory."""
    noise = np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "b.png").write_bytes(b"")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "c.png")
    for name in ("a.jpg", "b.png", "c.png"):
        with pytest.raises(InputError, match=name):
            data.load_image(tmp_path / name, 32)


def test_a_dicom_file_is_told_what_to_do(tmp_path):
    """Guards: "cannot identify image file", and a user who does not know why."""
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (tmp_path / "b.dcm").write_bytes(bytes(300))
    for name in ("a", "b.dcm"):
        with pytest.raises(InputError, match="convert it to PNG first"):
            data.load_image(tmp_path / name)


def test_jpeg_draft_keeps_the_picture(tmp_path):
    """Guards: draft mode decoding below the size asked for."""
    big = Image.fromarray((RAMP * 255).astype(np.uint8)).resize((1000, 800))
    big.save(tmp_path / "a.jpg", quality=95)
    image = np.asarray(data.load_image(tmp_path / "a.jpg", 96), float)
    assert abs(image - np.asarray(big.resize((96, 96), Image.Resampling.BILINEAR), float)).max() < 8


def test_augment_moves_the_boxes_with_the_image():
    """Guards: boxes left behind by the crop, or mirrored."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((200, 200), np.uint8)
    pixels[60:120, 30:80] = 255           # a bright patch, its box in the manifest's format
    kept = 0
    for _ in range(50):
        image, regions = data.augment(Image.fromarray(pixels),
                                     [{"phrase": "x", "boxes": [[.15, .3, .4, .6]]}], 100, 1.0,
                                     rng)
        for region in regions:
            kept += 1
            y, x = np.nonzero(image > (int(image.min()) + int(image.max())) / 2)
            seen = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 100
            assert abs(seen - region["boxes"][0]).max() < 0.025
    assert kept > 30
    far = [{"phrase": "x", "boxes": [[0, 0, .1, .1]]}]
    assert any(not data.augment(Image.fromarray(pixels), far, 100, 1.0, rng)[1] for _ in range(50))


# ---- sampling ------------------------------------------------------------------------------------

def test_sentences_sampled_are_4_to_8_in_order():
    """Guards: shuffled or repeated sentences, a bound off by one."""
    sentences = data.split_sentences(" ".join(f"Sentence {i} of 1.5 cm." for i in range(12)))
    assert len(sentences) == 12
    rng, sizes = np.random.default_rng(0), Counter()
    for _ in range(300):
        some = data.sample_sentences(sentences, rng)
        assert some == [s for s in sentences if s in some]
        sizes[len(some)] += 1
    assert set(sizes) == {4, 5, 6, 7, 8}
    assert data.sample_sentences(sentences[:2], rng) == sentences[:2]


def test_sub_reports_are_five_sentences():
    """Guards: a lost rest, six sentences, an empty piece."""
    report = " ".join(f"Number {i}." for i in range(12))
    assert [len(data.split_sentences(s)) for s in data.sub_reports(report)] == [5, 5, 2]
    assert " ".join(data.sub_reports(report)) == report and data.sub_reports("") == []


def test_tasks_are_drawn_as_the_paper_says():
    """Guards: boxes that never train; L_c and L_g,d of unequal share where boxes are there."""
    rng = np.random.default_rng(0)
    draw = lambda report, regions, objectives="scgd": [
        task for task, *_ in data.sample_tasks(report, regions, objectives, 1, rng)]
    share = Counter(t for _ in range(8000) for t in draw(ROW["report"], ROW["regions"]))
    assert abs(share["c"] / 8000 - 1 / 2) < 0.02 and abs(share["g"] / 8000 - 1 / 4) < 0.02
    assert abs(share["d"] / 8000 - 1 / 4) < 0.02
    assert draw(ROW["report"], []) == ["c"] and draw("", []) == []
    assert draw(ROW["report"], [{"phrase": "No effusion.", "boxes": []}]) == ["c"]
    assert draw(ROW["report"], ROW["regions"], "g") == ["g"] and draw(ROW["report"], [], "g") == []
    assert draw(ROW["report"], ROW["regions"], "s") == []


def test_location_aware_rows_swap_prompt_and_target():
    """Guards: Eq. 3 and its dense captioning twin given the same target."""
    for row in (("g", "Detect all instances of: The heart.", "300 500 700 800"),
                ("d", "Describe the regions: 300 500 700 800", "The heart.")):
        assert data.sample_tasks("", ROW["regions"], row[0], 1, np.random.default_rng()) == [row]


def test_samples_depend_on_seed_epoch_and_index_alone(rows):
    """Guards: draws that change with the order of access, so with the number of workers."""
    one, two = (data.ChestXrays(rows, 32, augmented=1.0, n_regions=2) for _ in range(2))
    first = [one[(3, i)] for i in (0, 1, 2)]
    again = [two[(3, i)] for i in (2, 1, 0)][::-1]
    for a, b in zip(first, again):
        assert np.array_equal(a["image"], b["image"])
        assert a["text"] == b["text"] and a["tasks"] == b["tasks"]
    assert not np.array_equal(one[(4, 0)]["image"], first[0]["image"])


def test_special_tokens_in_a_report_are_plain_text(model):
    """Guards: a report that ends the sequence, or injects an image, by writing "<eos>"."""
    for tokenizer in (model.text_tokenizer, model.llm_tokenizer):
        ids = data.plain_ids(tokenizer, "a <eos> <bos> <pad> b")
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_text_ids_are_as_siglip_wants_them(model):
    """Guards: left padding, upper case, a lost <eos> when cut, a <bos> (SigLIP pools the last
    place)."""
    tokenizer = model.text_tokenizer
    ids = data.text_ids(tokenizer, ["Large Nodule.", "word " * 100], 16)
    assert ids.shape == (2, 16)
    assert ids[0, -1] == tokenizer.pad_token_id and ids[1, -1] == tokenizer.eos_token_id
    assert torch.equal(ids[0], data.text_ids(tokenizer, ["large nodule."], 16)[0])
    assert (ids == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]
    assert tokenizer.bos_token_id not in ids


def test_collate_places_prompt_target_and_eos(model, batch):
    """Guards: targets that cover the prompt or the padding; rows tied to the wrong image."""
    tokenizer = model.llm_tokenizer
    for ids, is_target, image, task in zip(batch["ids"], batch["is_target"],
                                           batch["image_of_row"], batch["task_of_row"]):
        first, last = is_target.nonzero().flatten()[[0, -1]].tolist()
        assert is_target[first:last + 1].all() and ids[last] == tokenizer.eos_token_id
        assert (ids[last + 1:] == tokenizer.pad_token_id).all()
        prompt, target = tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:last])
        prompts = (data.CAPTIONING_PROMPT, data.GROUNDING_PROMPT, data.DENSE_CAPTIONING_PROMPT)
        start = prompts[task].split("{")[0]
        assert prompt.startswith(start) and prompt.endswith("\n")
        assert data.text_to_boxes(target)[1] == (task != 1)
    assert batch["image_of_row"].max() < len(batch["image"])


def test_a_long_prompt_is_cut_and_said_once(model, capsys):
    """Guards: a phrase of 20 KB that fills the memory, a prompt without its line break, or a note
    for each of a thousand rows."""
    tokenizer = model.llm_tokenizer
    data.say_once.cache_clear()
    long = data.GROUNDING_PROMPT.format(phrase="small nodule " * 1600)
    ids = [data.prompt_ids(tokenizer, prompt) for prompt in (long, long + "x")]
    assert all(abs(len(some) - 256) <= 2 for some in ids)
    assert tokenizer.decode(ids[0]).startswith("Detect all instances of: small nodule small")
    assert tokenizer.decode(ids[0]).endswith("\n") and data.cut_text(tokenizer, "short") == "short"
    assert capsys.readouterr().err.count("is cut to its first") == 1


def test_a_batch_without_rows_for_the_llm(model, rows):
    """Guards: pad_sequence on an empty list when contrastive learning runs alone."""
    dataset = data.ChestXrays(rows, 32, "s")
    batch = data.Collate(model.text_tokenizer, 16, model.llm_tokenizer, 8)([dataset[(0, 0)]])
    assert batch["ids"].shape == batch["is_target"].shape == (0, 0)
    assert batch["ids"].dtype == torch.long and batch["is_target"].dtype == torch.bool


def test_tasks_are_those_of_the_losses():
    """Guards: a task that data.py draws and no loss knows, or in another order."""
    assert "".join(data.TASK_WEIGHT) == losses.TASKS


def test_commands_start_without_torch():
    """Guards: seconds of imports before --help or a wrong flag is answered."""
    code = "import sys, data; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_digits_are_one_token_each(model):
    """Guards: a learned tokenizer that merges digits, so that a coordinate has many spellings."""
    ids = data.plain_ids(model.llm_tokenizer, "120 305")
    assert len(ids) == 7


# ---- the phantom ---------------------------------------------------------------------------------

def test_phantom_is_the_same_for_the_same_seed(tmp_path):
    """Guards: a draw that depends on the process pool or the clock."""
    sizes = {"train": 6, "test": 3}
    one, two = (data.make_phantom(tmp_path / name, sizes, 5, quiet=True) for name in "ab")
    assert (one / "manifest.jsonl").read_bytes() == (two / "manifest.jsonl").read_bytes()
    for image in (one / "images").iterdir():
        assert np.array_equal(Image.open(image), Image.open(two / "images" / image.name))
    other = data.make_phantom(tmp_path / "c", sizes, 6, quiet=True)
    assert (one / "manifest.jsonl").read_bytes() != (other / "manifest.jsonl").read_bytes()


def test_phantom_is_rich_and_its_phrase_prior_low(tmp_path):
    """Guards: a phantom whose phrases give the boxes away, whose reports repeat, or say the
    body's position always, never or in few words."""
    folder = data.make_phantom(tmp_path / "p", {"train": 900, "test": 400}, quiet=True)
    train, test = (data.read_manifest(folder, split) for split in ("train", "test"))
    reports = Counter(tuple(sorted(data.split_sentences(row["report"]))) for row in test)
    assert len(reports) > 0.9 * len(test)
    prior = metrics.phrase_prior(train)
    regions = [region for row in test for region in row["regions"]]
    score = metrics.precision_recall_f1([prior(r["phrase"]) for r in regions],
                                        [r["boxes"] for r in regions])
    assert len(regions) >= 300 and score["F@0.5"] <= 0.25
    for row in test:
        assert all(region["phrase"] in row["report"] for region in row["regions"])
    text = " ".join(row["report"] for row in train)
    positions = Counter(re.findall(r"\w+ view, chest \w+ and \w+\.", text))
    assert 400 < positions.total() < 500
    assert len(positions) == 3 ** 3 and max(positions.values()) < 3 * 450 / 27


def test_phantom_says_how_the_body_lies():
    """Guards: a report that puts the body on the other side of the image, or high for low."""
    widths = []
    for centre, width, said in (((.40, .60), .72, "Wide view, chest low and right."),
                                ((.50, .50), .88, "Standard view, chest level and central."),
                                ((.62, .38), 1.06, "Close view, chest high and left.")):
        canvas = data.Canvas(np.random.default_rng(0), 96)
        canvas.centre, canvas.scale = np.array(centre), np.array([width, width]) / 2
        canvas.pixels += canvas.mask([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 100
        assert canvas.position() == said
        y, x = np.nonzero(canvas.pixels > 100)
        widths.append(np.ptp(x))
        if "central" not in said:
            assert (x.mean() > canvas.n / 2) == ("left" in said)
            assert (y.mean() > canvas.n / 2) == ("low" in said)
    assert widths[0] < widths[1] < widths[2]                   # wide, standard, close


def test_phantom_findings_are_where_their_boxes_say():
    """Guards: a box that misses its finding, sides swapped (the patient's left is the picture's
    right)."""
    for kind, sign in (("nodule", 1), ("pacemaker", 1), ("pneumothorax", -1)):
        for side in ("left", "right"):
            canvas = data.Canvas(np.random.default_rng(3), 160)
            before = canvas.pixels.copy()
            outline = data.draw_finding(canvas, kind, side, "mid", 0.4)
            changed = sign * (canvas.pixels - before) > 20
            y, x = np.nonzero(changed)
            box = canvas.box(outline)
            cx = (box[0] + box[2]) / 2
            assert (cx > canvas.centre[0]) == (side == "left")
            inside = ((x / 160 > box[0] - .02) & (x / 160 < box[2] + .02)
                      & (y / 160 > box[1] - .02) & (y / 160 < box[3] + .02))
            least = 0.6 if kind == "pacemaker" else 0.95       # the lead leaves the box
            assert inside.mean() > least


def test_two_first_runs_at_once_leave_one_whole_phantom(tmp_path):
    """Guards: a draft that two processes share, or that a killed run left; a folder that only its
    owner may read."""
    sizes = {"train": 30, "test": 3}
    (tmp_path / ".p.killed").mkdir()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: data.make_phantom(tmp_path / "p", sizes, quiet=True), range(2)))
    assert len(data.read_manifest(tmp_path / "p")) == 33
    assert sorted(os.listdir(tmp_path)) == [".p.killed", "p"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "p").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_phantom_command_refuses_to_overwrite(tmp_path):
    """Guards: a data set lost to a second run."""
    run("data.py", "phantom", tmp_path / "p", "--train", 2, "--val", 0, "--test", 1)
    assert "exists already" in run("data.py", "phantom", tmp_path / "p", ok=False)
