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
import train
from conftest import ROOT
from data import InputError

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


def extent(bright):
    """The box around the true pixels of (h, w), as fractions."""
    y, x = np.nonzero(bright)
    h, w = bright.shape
    return np.array([x.min() / w, y.min() / h, (x.max() + 1) / w, (y.max() + 1) / h])


@pytest.fixture(scope="module")
def letters():
    """A tokenizer with a token a letter, so that ids can be counted by hand."""
    return data.learn_tokenizer(["x"], 260)                    # 256 bytes and four special tokens


def spell(tokenizer, ids):
    """Ids of `letters` as text: $ for <eos>, _ for padding."""
    signs = {"<eos>": "$", "<pad>": "_", "Ġ": " ", "Ċ": "\n"}
    return "".join(signs.get(token, token) for token in tokenizer.convert_ids_to_tokens(ids))


# ---- boxes as text -------------------------------------------------------------------------------

def test_boxes_round_trip():
    """Guards: a lost axis order, a rounding that empties a box, an order that depends on the
    input's."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = rng.uniform(0, 0.999, (rng.integers(1, 4), 2))
        boxes = np.concatenate([low, low + rng.uniform(0, 1, low.shape) * (1 - low)], 1).tolist()
        text = data.boxes_to_text(boxes)
        back, malformed = data.text_to_boxes(text)
        assert not malformed and len(back) == len(boxes)
        expected = sorted(np.round(boxes, 3).tolist())
        assert np.allclose(expected, back, atol=0.0011)
        assert text == data.boxes_to_text(boxes[::-1]) == data.boxes_to_text(back)


def test_box_text_is_what_the_model_learns():
    """Guards: y before x, in a box or in the order of boxes; floats, another scale."""
    text = data.boxes_to_text([[0.5, 0.25, 1, 0.75], [0.1, 0.6, 0.3, 0.8]])
    assert text == "100 600 300 800; 500 250 1000 750"
    assert data.boxes_to_text([[1 - 1e-9, 0, 1, 1e-9]]) == "999 0 1000 1"


@pytest.mark.parametrize("text", [
    "", "1 2 3", "1 2 3 4 5", "300 0 100 50", "0 300 50 100", "0 0 1001 5", "0 0 5 1001", "a b c d",
    "1,2,3,4", "-1 2 3 4", "1 2 3 4;", "nan 0 1 2", "١ ٢ ٣ ٤", "1 2 3 4; none", "10 10 10 20",
    "10 20 20 20", "99999999999999999999 0 1 1"])
def test_malformed_box_text_gives_no_boxes_and_says_so(text):
    """Guards: an exception, or half an answer, from what a language model may write."""
    assert data.text_to_boxes(text) == ([], True)


# ---- the manifest --------------------------------------------------------------------------------

def test_manifest_is_read_by_folder_and_by_file(tmp_path):
    """Guards: paths relative to the working directory; a byte order mark or a null in the way;
    white space of a hospital's table kept in the report."""
    first = {**ROW, "report": " Clear\n  lungs. "}
    folder = write(tmp_path / "d", "\ufeff" + json.dumps(first), "",
                   {**ROW, "split": "test", "report": None, "regions": None})
    for path in (folder, folder / "manifest.jsonl"):
        rows = data.read_manifest(path)
        assert [row["split"] for row in rows] == ["train", "test"]
        assert rows[0]["path"] == str(folder / "a.png") and rows[0]["report"] == "Clear lungs."
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


def test_find_row_knows_an_image_by_path_and_link(tmp_path):
    """Guards: a pool image that is shown itself as a demonstration; another image of the same size
    taken for it."""
    folder = write(tmp_path / "d", ROW, {**ROW, "image": "b.png"}, image=False)
    for name, value in (("a.png", b"1234"), ("b.png", b"1235"), ("other.png", b"1236")):
        (folder / name).write_bytes(value)
    (folder / "link.png").symlink_to("a.png")
    rows = data.read_manifest(folder)
    found = [data.find_row(rows, folder / name) for name in ("a.png", "link.png", "b.png")]
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
                  "unknown key 'reports', not read: 1", "unknown key 'label'",
                  "no rows of split 'val'",
                  "in train and in test, so scores mislead: 1, such as 'p'"):
        assert any(words in note for note in notes), words
    assert len(notes) == 8 and not any("\n" in note for note in notes)


def test_check_does_not_draw_over_its_inputs(tmp_path):
    """Guards: an image or the manifest replaced by the sheet, through a link too; an image lost
    because its row has a mistake."""
    for name, row in (("good", ROW), ("wrong", {**ROW, "split": "none"})):
        folder = write(tmp_path / name, row, {**ROW, "image": "a" * 5000})
        (folder / "link.png").symlink_to("a.png")
        for png in ("a.png", "manifest.jsonl", "link.png"):
            before = (folder / png).read_bytes()
            with pytest.raises(InputError, match=png):
                data.check(folder, folder / png)
            assert (folder / png).read_bytes() == before


def test_an_empty_argument_is_said(monkeypatch):
    """Guards: a variable of the shell that is not set, taken for a flag that is not given."""
    monkeypatch.setattr(sys, "argv", ["data.py", "phantom", ""])
    with pytest.raises(SystemExit, match="data.py: an argument is empty"):
        data.run_command(data.main)


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


def test_boxes_are_drawn_where_they_are(tmp_path):
    """Guards: a picture that hides swapped axes, or shows good boxes in the wrong place."""
    image = Image.new("RGB", (200, 160))
    data.draw_boxes(image, [{"phrase": "no box", "boxes": []},
                            {"phrase": "x", "boxes": [[0.25, 0.5, 0.75, 1]]}])
    yellow = (np.asarray(image) == (255, 210, 31)).all(2)
    yellow[:40] = False                                        # its phrase, in the same colour
    assert np.allclose(extent(yellow), [0.25, 0.5, 0.75, 1], atol=0.01)
    assert not yellow[100:140, 70:130].any()                   # an outline, not a filled box


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


def test_window_levels_has_the_worked_values():
    """Guards: other percentiles than 0.5 and 99.5, so other grey levels of every 16-bit image; a
    lone bright pixel that leaves nothing; NaN or infinity that spreads."""
    values = np.arange(1001.0)                                 # percentiles 5 and 995
    values = np.concatenate([values, -values, values + 9000])[:1001].reshape(7, 143)
    levels = data.window_levels(values).flatten()
    assert levels.dtype == np.uint8
    for value, level in ((0, 0), (5, 0), (203, 51), (401, 102), (599, 153), (797, 204), (995, 255),
                         (1000, 255)):                         # 255 (value - 5) / 990
        assert levels[value] == level
    values = values.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf                    # taken for 0
    assert (data.window_levels(values).flatten()[[0, 1, 2, 203, 1000]] == [0, 0, 0, 51, 255]).all()
    lone = np.full((50, 50), 3.0)
    lone[4, 2] = 10
    assert data.window_levels(lone).sum() == 255 == data.window_levels(lone)[4, 2]
    assert data.window_levels(np.full((9, 9), 1000)).max() == 0


def test_only_narrow_images_are_windowed():
    """Guards: a grey image that uses 30 of 256 levels left flat; ordinary contrast changed; a
    division by zero on a blank image."""
    for levels, seen in (((100, 130), (0, 255)), ((100, 163), (0, 255)), ((100, 164), (100, 164)),
                         ((0, 255), (0, 255)), ((7, 7), (7, 7))):
        pixels = np.repeat(np.array(levels, np.uint8), 32).reshape(8, 8)
        assert data.load_image(Image.fromarray(pixels)).getextrema() == seen


def test_shrinking_takes_means():
    """Guards: an image thinned to every second pixel, which loses small findings."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = np.asarray(data.load_image(Image.fromarray(board), 32), int)
    assert abs(small[2:-2, 2:-2] - 127.5).max() < 3


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
    (tmp_path / "c.pgm").write_bytes(b"P5 30000 30000 255 ")   # the header of 900 megapixels
    for words in ("a.jpg", "b.png", "c.pgm.*bomb"):
        with pytest.raises(InputError, match=words):
            data.load_image(tmp_path / words.split(".*")[0], 32)


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
    """Guards: boxes left behind by the crop, mirrored or with swapped axes; a region kept though
    one of its boxes is lost, or dropped though its boxes are there."""
    inner, corner = [0.4, 0.4, 0.6, 0.65], [0, 0.1, 0.15, 0.3]
    picture = np.zeros((180, 240), np.uint8)
    picture[72:117, 96:144] = picture[18:54, :36] = 255        # the two boxes as bright patches
    regions = [{"phrase": "both", "boxes": [inner, corner]}, {"phrase": "inner", "boxes": [inner]},
               {"phrase": "corner", "boxes": [corner]}, {"phrase": "none", "boxes": []}]
    rng, cases = np.random.default_rng(0), Counter()
    for _ in range(200):
        pixels, kept = data.augment(Image.fromarray(picture), regions, 200, 1.0, rng)
        assert pixels.shape == (200, 200) and pixels.dtype == np.uint8
        bright = pixels > (int(pixels.min()) + int(pixels.max())) / 2
        columns = np.nonzero(bright.any(0))[0]
        right = columns[np.diff(columns, prepend=columns[0]) > 1].max(initial=columns[0])
        seen = extent(bright & (np.arange(200) >= right))      # the inner patch is always whole
        boxes, part = {"inner": [seen], "none": []}, 0
        if right > columns[0]:                                 # some of the corner patch is left
            left = extent(bright & (np.arange(200) < right))
            zoom = (seen[2:] - seen[:2]) / (0.2, 0.25)
            part = np.prod((left[2:] - left[:2]) / zoom / (0.15, 0.2))
            boxes |= {"corner": [left], "both": [seen, left]}
        if 0.6 < part < 0.73:                                  # too close to two thirds to tell
            continue
        cases["whole" if part > 0.95 else "kept" if part > 0.7 else "lost"] += 1
        expected = (["both"] if part > 0.7 else []) + ["inner"] + (
            ["corner"] if part > 0.7 else []) + ["none"]
        assert [region["phrase"] for region in kept] == expected
        for region in kept:
            assert np.allclose(region["boxes"], boxes[region["phrase"]], atol=0.011)
    assert min(cases["whole"], cases["kept"], cases["lost"]) >= 8


def test_augment_changes_contrast_and_brightness_a_little():
    """Guards: an image that stays as it is, or is too dark to read; a strength that does
    nothing."""
    picture = np.repeat(np.array([[108, 148]], np.uint8), 32, 1).repeat(64, 0)
    rng, middles, contrasts = np.random.default_rng(0), [], []
    for _ in range(100):
        pixels, _ = data.augment(Image.fromarray(picture), [], 64, 1.0, rng)
        low, high = (int(v) for v in (pixels[pixels > 60].min(), pixels.max()))    # black is padded
        middles.append((low + high) / 2 - 128)
        contrasts.append((high - low) / 40)
    assert -26 < min(middles) < -15 and 15 < max(middles) < 26
    assert 0.7 < min(contrasts) < 0.85 and 1.2 < max(contrasts) < 1.35
    pixels, kept = data.augment(Image.fromarray(picture), ROW["regions"], 64, 0.0, rng)
    assert np.array_equal(pixels, picture) and np.allclose(kept[0]["boxes"],
                                                           ROW["regions"][0]["boxes"])


# ---- sampling ------------------------------------------------------------------------------------

@pytest.mark.parametrize("sentences", [
    [], ["Clear lungs."], ["No effusion.", "2 nodules are seen.", "T12 is compressed."],
    ["Is it new?", "Yes!", "A 1.5 cm nodule.", "The tube is 3.2 cm above the carina."],
    ["The heart is enlarged.", "No full stop"]])
def test_sentences_are_cut_where_a_reader_would(sentences):
    """Guards: no cut before a digit, after a question or at a line break; a cut in a number; a
    sentence lost."""
    assert data.split_sentences(" ".join(sentences)) == sentences
    assert data.split_sentences(" " + "\n  ".join(sentences) + "\n") == sentences


def test_sub_reports_are_five_sentences():
    """Guards: a lost rest, six sentences, an empty piece."""
    numbers = [f"Number {i}." for i in range(12)]
    assert data.sub_reports(" ".join(numbers)) == [
        "Number 0. Number 1. Number 2. Number 3. Number 4.",
        "Number 5. Number 6. Number 7. Number 8. Number 9.", "Number 10. Number 11."]
    assert len(data.sub_reports(" ".join(numbers[:10]))) == 2 and data.sub_reports("") == []


def test_tasks_are_drawn_as_the_paper_says():
    """Guards: boxes that never train; L_c and L_g,d of unequal share where boxes are there."""
    rng = np.random.default_rng(0)
    draw = lambda report, regions, objectives="scgd": [
        task for task, *_ in data.sample_tasks(report, regions, objectives, 1, rng)]

    def share(objectives):
        drawn = Counter(t for _ in range(1000) for t in draw("A.", ROW["regions"], objectives))
        return [drawn[task] / 1000 for task in "cgd"]

    assert np.allclose(share("scgd"), [1 / 2, 1 / 4, 1 / 4], atol=0.05)
    assert np.allclose(share("cg"), [2 / 3, 1 / 3, 0], atol=0.05)
    assert np.allclose(share("gd"), [0, 1 / 2, 1 / 2], atol=0.05)
    assert draw(ROW["report"], []) == ["c"] and draw("", []) == []
    assert draw(ROW["report"], [{"phrase": "No effusion.", "boxes": []}]) == ["c"]
    assert draw(ROW["report"], ROW["regions"], "g") == ["g"] and draw(ROW["report"], [], "g") == []
    assert draw(ROW["report"], ROW["regions"], "s") == []


REGIONS = [{"phrase": "No effusion.", "boxes": []},
           {"phrase": "The heart.", "boxes": [[0.3, 0.5, 0.7, 0.8]]},
           {"phrase": "Nodules.", "boxes": [[0.6, 0.1, 0.7, 0.2], [0.2, 0.3, 0.25, 0.35]]},
           {"phrase": "Left lung.", "boxes": [[0.5, 0.1, 0.9, 0.75]]}]
BOX_TEXT = {"The heart.": "300 500 700 800", "Nodules.": "200 300 250 350; 600 100 700 200",
            "Left lung.": "500 100 900 750"}


@pytest.mark.parametrize("task", "gd")
def test_every_region_is_drawn_with_its_own_boxes(task):
    """Guards: only an image's first phrases ever trained; a region twice in a step; a phrase with
    another region's boxes; Eq. 3 and its dense captioning twin given the same target."""
    rng, shares = np.random.default_rng(0), Counter()
    for n, expected in ((1, 1), (2, 2), (3, 3), (9, 3)):
        for _ in range(300):
            drawn = data.sample_tasks("A report.", REGIONS, task, n, rng)
            phrases = [target if task == "d" else prompt.removeprefix("Detect all instances of: ")
                       for _, prompt, target in drawn]
            assert len(drawn) == len(set(phrases)) == expected
            assert drawn == [("g", f"Detect all instances of: {phrase}", BOX_TEXT[phrase])
                             if task == "g" else
                             ("d", f"Describe the regions: {BOX_TEXT[phrase]}", phrase)
                             for phrase in phrases]
            shares[n, phrases[0]] += 1
    for n in (1, 2, 3):
        assert all(70 < shares[n, phrase] < 130 for phrase in BOX_TEXT)


SENTENCES = [f"Finding {i} is seen." for i in range(12)]


@pytest.fixture
def long_rows(tmp_path):
    """Two equal rows with a report of 12 sentences and the regions above."""
    row = {**ROW, "report": " ".join(SENTENCES), "regions": REGIONS}
    return data.read_manifest(write(tmp_path / "long", row, row))


def test_a_sample_has_the_image_some_sentences_and_a_task(long_rows):
    """Guards: the whole report as the text of Eq. 1, shuffled or repeated sentences, a bound off by
    one; a part of the report as the target of captioning; a region that has no box asked for."""
    dataset, sizes, tasks = data.ChestXrays(long_rows, 64, n_regions=2), Counter(), Counter()
    assert len(dataset) == 2
    for epoch in range(150):
        sample = dataset[(epoch, epoch % 2)]
        picture = np.arange(4096, dtype=np.uint8).reshape(64, 64)
        assert np.array_equal(sample["image"], picture) and sample["path"] == long_rows[0]["path"]
        some = [sentence for sentence in SENTENCES if sentence in sample["text"]]
        assert sample["text"] == " ".join(some)
        sizes[len(some)] += 1
        tasks[tuple(task for task, *_ in sample["tasks"])] += 1
        if sample["tasks"][0][0] == "c":
            assert sample["tasks"][0][1:] == ("Report this medical scan.", " ".join(SENTENCES))
    assert set(sizes) == {4, 5, 6, 7, 8} and min(sizes.values()) > 15
    assert set(tasks) == {("c",), ("g", "g"), ("d", "d")} and 55 < tasks[("c",)] < 95
    few = data.ChestXrays([{**long_rows[0], "report": "One. Two."}], 8)
    assert few[(0, 0)]["text"] == "One. Two." and few[(0, 0)]["image"].shape == (8, 8)


def test_phrases_stand_in_for_a_missing_report(long_rows):
    """Guards: an image paired with the empty text in Eq. 1, or with the phrases alone whose boxes
    the crop has kept."""
    dataset = data.ChestXrays([{**long_rows[0], "report": ""}], 16, augmented=1.0)
    for epoch in range(10):
        sample = dataset[(epoch, 0)]
        assert sample["text"] == "No effusion. The heart. Nodules. Left lung."
        assert "c" not in [task for task, *_ in sample["tasks"]]
    bare = data.ChestXrays([{**long_rows[0], "report": "", "regions": []}], 16)[(0, 0)]
    assert bare["text"] == "" and bare["tasks"] == []


@pytest.mark.parametrize("cached", [False, True])
def test_the_boxes_of_a_sample_follow_its_image(tmp_path, cached):
    """Guards: an augmented image learned with the boxes of the plain one; an image in memory that
    is augmented again in each epoch."""
    picture = np.zeros((120, 160), np.uint8)
    picture[36:96, 40:100] = 255
    region = {"phrase": "Bright.", "boxes": [[0.25, 0.3, 0.625, 0.8]]}
    folder = write(tmp_path / "d", {**ROW, "regions": [region]}, image=False)
    Image.fromarray(picture).save(folder / "a.png")
    row = data.read_manifest(folder)
    plain = data.ChestXrays(row, 64, "g", cached=cached)[(0, 0)]
    assert plain["tasks"] == [("g", "Detect all instances of: Bright.", "250 300 625 800")]
    dataset, seen = data.ChestXrays(row, 64, "g", augmented=1.0, cached=cached), set()
    for epoch in range(30):
        sample = dataset[(epoch, 0)]
        image = sample["image"]
        bright = extent(image > (int(image.min()) + int(image.max())) / 2)
        for _, _, target in sample["tasks"]:
            seen.add(target)
            assert np.allclose([int(v) / 1000 for v in target.split()], bright, atol=0.025)
    assert len(seen) > 20


def test_samples_depend_on_seed_epoch_and_index_alone(long_rows):
    """Guards: draws that change with the order of access, so with the number of workers, or with
    what is in memory; draws without the seed, the epoch or the index, the same again and again."""
    def draws(order, epoch=3, seed=0, cached=False):
        dataset = data.ChestXrays(long_rows * 3, 32, "scgd", 2, 1.0, cached, seed)
        if cached:
            dataset[(1, 0)], dataset[(1, 5)]
        samples = {i: dataset[(epoch, i)] for i in order}
        return [(samples[i]["image"].tobytes(), samples[i]["text"], str(samples[i]["tasks"]))
                for i in range(6)]

    first = draws(range(6))
    assert first == draws((5, 0, 3, 2, 1, 4)) == draws(range(6), cached=True)
    for other in (draws(range(6), seed=1), draws(range(6), epoch=4), first[1:] + first[:1]):
        for image_text_tasks in zip(zip(*first), zip(*other)):
            assert sum(a != b for a, b in zip(*image_text_tasks)) >= 3    # of six


# ---- tokens and batches --------------------------------------------------------------------------

def test_special_tokens_in_a_report_are_plain_text(letters):
    """Guards: a report that ends the sequence, or injects an image, by writing "<eos>"."""
    ids = data.plain_ids(letters, "a <eos> <bos> <pad> b")
    assert spell(letters, ids) == "a <eos> <bos> <pad> b" and len(ids) == 21


def test_digits_are_one_token_each():
    """Guards: a learned tokenizer that merges digits, so that a coordinate has many spellings."""
    tokenizer = data.learn_tokenizer(["The 120 305 120 305 of the nodule."] * 50, 320)
    assert len(data.plain_ids(tokenizer, "120 305")) == 7
    assert len(data.plain_ids(tokenizer, "the nodule.")) == len(["the", " nodule", "."])


def test_text_ids_are_as_siglip_wants_them(letters):
    """Guards: left padding, upper case, a lost <eos> when cut, a <bos> (SigLIP pools the last
    place)."""
    ids = data.text_ids(letters, ["A b", "Large Nodule.", "", "12345", "123456"], 6)
    assert ids.dtype == torch.long
    assert [spell(letters, row) for row in ids] == ["a b$__", "large$", "$_____", "12345$",
                                                    "12345$"]


def sample(number, text, *tasks):
    return {"image": np.full((2, 2), number, np.uint8), "path": f"{number}.png", "text": text,
            "tasks": list(tasks)}


def test_a_batch_is_the_one_written_by_hand(letters):
    """Guards: targets that cover the prompt or the padding, or miss <eos>; a row of the LLM tied to
    another image, as images have unequal numbers of rows; a task under another loss's number."""
    samples = [sample(5, "A b", ("g", "in", "1 2"), ("g", "p", "3")), sample(6, "Longer text"),
               sample(7, "", ("c", "q", "hello")), sample(8, "X", ("d", "a bc", "z"))]
    batch = data.Collate(letters, 6, letters, 6)(samples)
    assert [spell(letters, row) for row in batch["ids"]] == [
        "in\n1 2$_", "p\n3$____", "q\nhello$", "a bc\nz$_"]
    assert ["".join("-x"[target] for target in row) for row in batch["is_target"].tolist()] == [
        "---xxxx-", "--xx----", "--xxxxxx", "-----xx-"]
    assert batch["image_of_row"].tolist() == [0, 0, 2, 3]
    assert batch["task_of_row"].tolist() == [1, 1, 0, 2]
    assert batch["task_of_row"].tolist() == [losses.TASKS.index(task) for task in "ggcd"]
    assert [spell(letters, row) for row in batch["text"]] == ["a b$__", "longe$", "$_____",
                                                              "x$____"]
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 2, 2)
    assert batch["image"][:, 1, 0].tolist() == [5, 6, 7, 8]
    assert batch["paths"] == ["5.png", "6.png", "7.png", "8.png"]
    assert "text" not in data.Collate(None, 6, letters, 6)(samples)


def test_a_target_that_is_too_long(letters):
    """Guards: a target cut in the middle and then <eos>: the LLM learns to stop there."""
    text, boxes = "One two. Three four.", "100 200 300 400; 500 600 700 800"
    batch = data.Collate(None, 6, letters, 25)([sample(0, "", ("c", "q", text), ("g", "q", boxes))])
    assert [spell(letters, row) for row in batch["ids"]] == [
        "q\nOne two. Three four.$____", "q\n100 200 300 400; 500 600 "]
    batch = data.Collate(None, 6, letters, 12)([sample(0, "", ("c", "q", text))])
    assert spell(letters, batch["ids"][0]) == "q\nOne two. Thr" and batch["is_target"].sum() == 12


def test_a_long_prompt_is_cut_and_said_once(letters, capsys):
    """Guards: a phrase of 20 KB that fills the memory, a prompt without its line break, or a note
    for each of a thousand rows."""
    data.say_once.cache_clear()
    for n in (255, 256):
        assert spell(letters, data.prompt_ids(letters, "p" * n)) == "p" * n + "\n"
    assert capsys.readouterr().err == ""
    for text in ("ab" * 200, "abc" * 10_000):
        assert spell(letters, data.prompt_ids(letters, text)) == text[:256] + "\n"
    assert capsys.readouterr().err.count("is cut to its first") == 1


def test_a_batch_without_rows_for_the_llm(letters):
    """Guards: pad_sequence on an empty list when contrastive learning runs alone."""
    batch = data.Collate(letters, 16, letters, 8)([sample(1, "A report.")])
    assert batch["ids"].shape == batch["is_target"].shape == (0, 0)
    assert batch["ids"].dtype == torch.long and batch["is_target"].dtype == torch.bool
    assert batch["image_of_row"].dtype == batch["task_of_row"].dtype == torch.long


def test_each_epoch_and_seed_has_an_order_of_its_own():
    """Guards: an order without the seed or the epoch: the same negatives in Eq. 1 again and
    again."""
    def orders(seed):
        keys = [key for batch in train.batches(12, 4, 3, seed, 0, 6) for key in batch]
        assert [epoch for epoch, _ in keys] == [0] * 12 + [1] * 12
        return [[i for _, i in keys[:12]], [i for _, i in keys[12:]]]

    found = orders(0) + orders(1)
    assert all(sorted(order) == list(range(12)) for order in found) and orders(0) == found[:2]
    assert len(set(map(tuple, [range(12), *found]))) == 5


def test_commands_start_without_torch():
    """Guards: seconds of imports before --help or a wrong flag is answered."""
    code = "import sys, data; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- the phantom ---------------------------------------------------------------------------------

def test_phantom_is_the_same_for_the_same_seed(tmp_path):
    """Guards: a draw that depends on the process pool or the clock."""
    sizes = {"train": 3, "test": 2}
    one, two = (data.make_phantom(tmp_path / name, sizes, 5, quiet=True) for name in "ab")
    assert (one / "manifest.jsonl").read_bytes() == (two / "manifest.jsonl").read_bytes()
    for image in (one / "images").iterdir():
        assert np.array_equal(Image.open(image), Image.open(two / "images" / image.name))
    other = data.make_phantom(tmp_path / "c", sizes, 6, quiet=True)
    assert (one / "manifest.jsonl").read_bytes() != (other / "manifest.jsonl").read_bytes()


def test_phantom_is_rich_and_its_phrase_prior_low(tmp_path, monkeypatch):
    """Guards: a phantom whose phrases give the boxes away, whose reports repeat, or say the
    body's position always, never or in few words."""
    monkeypatch.setattr(data.Canvas, "mask", lambda *_, **__: 0)       # the rows need no picture
    (tmp_path / "images").mkdir()
    train, test = ([data.draw_phantom(tmp_path, split, i, 0, 16) for i in range(n)]
                   for split, n in (("train", 400), ("test", 150)))
    reports = Counter(tuple(sorted(data.split_sentences(row["report"]))) for row in test)
    assert len(reports) > 0.9 * len(test)
    prior = metrics.phrase_prior(train)
    regions = [region for row in test for region in row["regions"]]
    score = metrics.precision_recall_f1([prior(r["phrase"]) for r in regions],
                                        [r["boxes"] for r in regions])
    assert len(regions) >= 250 and score["F@0.5"] <= 0.25
    for row in test:
        assert all(region["phrase"] in row["report"] for region in row["regions"])
    text = " ".join(row["report"] for row in train)
    positions = Counter(re.findall(r"\w+ view, chest \w+ and \w+\.", text))
    assert 160 < positions.total() < 240
    assert len(positions) == 3 ** 3 and max(positions.values()) < 3 * 200 / 27


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
    sizes = {"train": 8, "test": 3}
    (tmp_path / ".p.killed").mkdir()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: data.make_phantom(tmp_path / "p", sizes, quiet=True), range(2)))
    assert len(data.read_manifest(tmp_path / "p")) == 11
    assert sorted(os.listdir(tmp_path)) == [".p.killed", "p"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "p").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_phantom_command_refuses_to_overwrite(tmp_path, monkeypatch, capsys):
    """Guards: a data set lost to a second run; flags of other splits or another seed."""
    out = tmp_path / "p"
    monkeypatch.setattr(sys, "argv", ["data.py", "phantom", str(out), "--train", "2", "--val", "0",
                                      "--test", "1", "--seed", "5"])
    data.main()
    assert "python data.py check" in capsys.readouterr().out
    assert [row["split"] for row in data.read_manifest(out)] == ["train", "train", "test"]
    same = data.make_phantom(tmp_path / "same", {"train": 2, "test": 1}, seed=5, quiet=True)
    assert (out / "manifest.jsonl").read_bytes() == (same / "manifest.jsonl").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        data.main()
