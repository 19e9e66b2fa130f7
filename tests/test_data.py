"""The manifest, box text, sentences, images, sampling and the phantom."""

import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
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


@pytest.mark.parametrize("text, n_boxes", [
    ("100 200 300 400; 500 600 700 800" + data.CUT, 1), ("100 200 300 400; 500 60" + data.CUT, 1),
    ("100 200 300 400; 500 600 700 800; 9", 2), ("100 200 300 400; 500 600 ", 1),
    ("100 200 300 400; 500 600 700", 1), ("100 200 300 400; 500 600 700 800", 2)])
def test_whole_boxes_of_a_cut_answer_count(text, n_boxes):
    """Guards: eight good boxes lost with half a ninth; a box that may lack its last digit taken
    for whole in an answer that is marked as cut."""
    boxes = [[.1, .2, .3, .4], [.5, .6, .7, .8]]
    assert data.text_to_boxes(text) == (boxes[:n_boxes], False)


def test_a_cut_answer_without_a_whole_box_is_malformed():
    """Guards: "no finding" scored for an answer that was cut within its first box."""
    for text in ("100 200" + data.CUT, "100 200 300 400" + data.CUT, data.CUT, "The he" + data.CUT,
                 "100 200 300 400; x" + "; 5" + data.CUT):
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
               ([0, 0, 10 ** 400, 1], "pixels"), ([25, 10, 50, 60.5], "percent by 100"),
               ([250, 100, 500, 605], "thousandths by 1000")]
WRONG += [({"regions": [{"phrase": "x", "boxes": [box]}]}, words) for box, words in WRONG_BOXES]
WRONG += [({"regions": [{"phrase": "", "boxes": []}]}, "phrase"),
          ({"image": "a" * 5000}, "File name too long"),
          ({"report": "half a pair: \ud83d"}, "surrogates"),
          ({"labels": "nodule"}, "'labels' is 'nodule'"), ({"labels": [1]}, "a list of words")]
WRONG += [({"report": word}, "a missing value written as text")
          for word in ("nan", "NaN", " None ", "null", "<NA>")]
WRONG += [({"patient": "nan"}, "'patient' is 'nan'"),
          ({"regions": [{"phrase": "None", "boxes": []}]}, "expected 'phrase'")]


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


def test_equal_phrases_of_an_image_are_one_region(tmp_path):
    """Guards: a set with a row a box, where a perfect answer has F 72: each of its boxes is also
    expected alone; a box that is listed twice expected twice; white space that hides a phrase."""
    one, two, three = [0.1, 0.1, 0.2, 0.2], [0.5, 0.1, 0.6, 0.2], [0.3, 0.3, 0.4, 0.4]
    folder = write(tmp_path / "d", {**ROW, "regions": [
        {"phrase": " Rib\n fracture. ", "boxes": [one]}, {"phrase": "Nodule.", "boxes": [three]},
        {"phrase": "Rib fracture.", "boxes": [two, one]}, {"phrase": "No effusion.", "boxes": []},
        {"phrase": "Rib\u00a0 fracture.", "boxes": []}]})
    assert data.read_manifest(folder)[0]["regions"] == [
        {"phrase": "Rib fracture.", "boxes": [one, two]}, {"phrase": "Nodule.", "boxes": [three]},
        {"phrase": "No effusion.", "boxes": []}]


def test_a_word_of_a_placeholder_is_no_placeholder(tmp_path):
    """Guards: a short report refused because it contains "none" or "null"."""
    reports = ["None.", "None of the lines moved.", "No nan", "null hypothesis", "normal"]
    folder = write(tmp_path / "d", *({**ROW, "report": report} for report in reports))
    assert [row["report"] for row in data.read_manifest(folder)] == reports


def test_a_study_is_a_patient_and_a_study():
    """Guards: CheXpert's "study1" of all patients taken for one study, so Table 1 over a single
    image; both images of a study in Table 1; a study without a report, or an image of it, in it."""
    rows = [{**ROW, "patient": patient, "study": study, "report": report, "image": str(n)}
            for n, (patient, study, report) in enumerate([
                ("p1", "study1", "One. Two."), ("p2", "study1", "Three."), ("p3", "study1", ""),
                ("p1", "study1", "Frontal again."), ("p1", "study2", ""),
                ("p1", "study2", "One. Two. Three. Four. Five. Six.")])]
    images, texts, owner = data.sub_report_table(rows)
    assert images == [0, 1, 5] and owner.tolist() == [0, 1, 2, 2]
    assert texts[:2] == ["One. Two.", "Three."]
    counts = data.count_rows(rows, "train")
    assert (counts["images"], counts["studies"], counts["patients"]) == (6, 4, 3)


def test_counts_are_those_by_hand():
    """Guards: phrases without boxes counted as pairs of text and box, or their images and studies
    as boxed; rows of another split counted too."""
    rows = [{**ROW, "regions": REGIONS}, {**ROW, "report": "", "regions": REGIONS[1:3]},
            {**ROW, "study": "t", "patient": "q", "regions": REGIONS[:1]}, {**ROW, "split": "val"}]
    assert data.count_rows(rows, "train") == {
        "images": 3, "boxed images": 2, "studies": 2, "boxed studies": 1, "patients": 2,
        "reports": 2, "pairs": 3 + 2, "boxes": 4 + 3}
    assert set(data.count_rows(rows, "test").values()) == {0}


def test_notes_say_what_is_odd():
    """Guards: a misspelt key or a shared patient that nobody hears of; reports that are never cut
    into sentences; notes on a set that is as it should be."""
    row = {**ROW, "report": "Clear lungs. Normal heart.", "labels": []}
    val, test = ({**row, "patient": split, "split": split, "image": split} for split in
                 ("val", "test"))
    assert data.manifest_notes([row, val, test]) == []
    assert data.manifest_notes([row, row, val, test]) == ["rows whose image another row has: 1"]
    odd = {"image": "b", "study": "s", "patient": "p", "split": "test", "reports": "Clear."}
    notes = data.manifest_notes([row, odd, {**odd, "image": "c", "patient": "q"}])
    assert notes == ["unknown key 'reports', not read: 2", "no rows of split 'val'",
                     "patients both in train and in test, so scores mislead: 1, such as 'p'"]
    single = {**row, "report": "clear lungs, normal heart", "image": "single"}
    assert data.manifest_notes([row, single, val, test]) == []          # 1 of 4
    [note] = data.manifest_notes([single, {**val, "report": "One line"}, test])
    assert note.startswith("2 of 3 reports looked at are a single sentence; ")
    # of many reports a part is looked at, from all over the set: a third of these, the first, has
    # two sentences
    many = [{**kind, "image": f"{n}"} for n, kind in
            enumerate([row] * 3000 + [single] * 6000)] + [val, test]
    [note] = data.manifest_notes(many)
    n_single, n = map(int, re.match("(.*) of (.*) reports", note).groups())
    assert 500 < n < 1000 and abs(n_single - n * 2 / 3) < 2
    assert data.manifest_notes(many[::-1][:-3001:-1] + many[-2:]) == []


def test_check_does_not_draw_over_its_inputs(tmp_path):
    """Guards: an image or the manifest replaced by the sheet, through a link too."""
    folder = write(tmp_path / "d", ROW, {**ROW, "split": "none"})
    (folder / "link.png").symlink_to("a.png")
    for png in ("a.png", "manifest.jsonl", "link.png"):
        before = (folder / png).read_bytes()
        with pytest.raises(InputError, match=png):
            data.check(folder, folder / png)
        assert (folder / png).read_bytes() == before


def test_check_notes_images_of_few_grey_levels(tmp_path, capsys):
    """Guards: black images, or 16-bit colour of which 16 levels are left, that pass the check
    unnoticed; a note on an image of 32 levels."""
    folder = write(tmp_path / "d", *({**ROW, "image": f"{n}.png"} for n in (1, 16, 31, 32, 256)))
    for n in (1, 16, 31, 32, 256):
        levels = np.linspace(0, 255, n).round().astype(np.uint8)
        Image.fromarray(np.resize(levels, (16, 16))).save(folder / f"{n}.png")
    assert data.check(folder, tmp_path / "sheet.png") == 0
    assert "note: images of fewer than 32 grey levels: 3\n" in capsys.readouterr().out


def test_check_notes_single_sentences_and_frames(tmp_path, capsys):
    """Guards: a set whose reports are never cut, or an image of which one page of two is read,
    that pass the check."""
    folder = write(tmp_path / "d", ROW, {**ROW, "image": "two.tif"})
    page = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    page.save(folder / "two.tif", save_all=True, append_images=[page])
    assert data.check(folder, tmp_path / "sheet.png") == 1
    printed = capsys.readouterr().out
    assert "manifest.jsonl:2: " in printed and "2 frames" in printed
    assert "note: 1 of 1 reports looked at are a single sentence; " in printed


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


def test_a_cell_shows_its_image_boxes_and_words():
    """Guards: an image stretched or cut, so boxes beside what they name; a caption that hides it; a
    frame of another colour; a traceback for an image that is a line."""
    region = {"phrase": "", "boxes": [[0.25, 0.5, 0.75, 1]]}
    cell = np.asarray(data.cell(Image.new("L", (300, 150), 90), [region], "One.\nTwo.", "orange"))
    assert cell.shape == (448, 360, 3) and (cell[1, 1] == (255, 165, 0)).all()
    grey = (cell == 90).all(2)                                 # 352 x 176, centred in 360 x 360
    assert np.allclose(extent(grey) * (360, 448, 360, 448), [4, 92, 356, 268])
    yellow = (cell == (255, 210, 31)).all(2)
    assert np.allclose(extent(yellow[92:268, 4:356]), [0.25, 0.5, 0.75, 1], atol=0.01)
    white = (cell == 255).all(2)                               # two lines of caption
    assert white[364:380].any() and white[380:400].any() and not white[:360].any()
    for size in ((1, 20_000), (20_000, 1)):
        assert data.cell(Image.new("L", size), [region], "line " * 99).size == (360, 448)


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


def test_what_is_no_image_is_said():
    """Guards: a tensor or a float array taken for several images, or an AttributeError."""
    for source in (np.zeros((4, 4)), torch.zeros(3, 4, 4), [], None):
        with pytest.raises(InputError, match="expected a path, a PIL image or a uint8 array"):
            data.load_image(source, 8)


def test_a_dicom_file_is_told_what_to_do(tmp_path):
    """Guards: "cannot identify image file", and a user who does not know why."""
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (tmp_path / "b.dcm").write_bytes(bytes(300))
    for name in ("a", "b.dcm"):
        with pytest.raises(InputError, match="convert it to PNG first"):
            data.load_image(tmp_path / name)


UPRIGHT = np.zeros((60, 90), np.uint8)                 # a bright finding in a corner, more than 32
UPRIGHT[:] = np.arange(90) // 2                        # grey levels
UPRIGHT[4:20, 60:84] = 240
# How to store an upright picture for each EXIF orientation, by EXIF's table of where row 0 and
# column 0 of the stored picture lie: 1 top left, 2 top right, 3 bottom right, 4 bottom left,
# 5 left top, 6 right top, 7 right bottom, 8 left bottom.
STORED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
          4: lambda a: a[::-1], 5: lambda a: a.T, 6: lambda a: a[:, ::-1].T,
          7: lambda a: a[::-1, ::-1].T, 8: lambda a: a[::-1].T}


def save_turned(path, orientation, pixels=UPRIGHT):
    """Write an upright picture turned, with the orientation tag that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = np.ascontiguousarray(STORED[orientation](pixels))
    Image.fromarray(turned).save(path, exif=exif, quality=95)


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".png", ".webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_read_upright(tmp_path, suffix, orientation):
    """Guards: a phone's photograph read lying down, so upright boxes beside the finding; a TIFF
    file with an orientation that Pillow garbles; width and height swapped, or turned twice."""
    path = tmp_path / f"a{suffix}"
    save_turned(path, orientation)
    assert data.image_shape(path) == (90, 60)
    image = np.asarray(data.load_image(path), int)
    assert image.shape == (60, 90) and np.abs(image - UPRIGHT).mean() < 3
    small = np.asarray(data.load_image(path, 30), int)
    assert np.allclose(extent(small > 140), [60 / 90, 4 / 60, 84 / 90, 20 / 60], atol=0.04)
    with Image.open(path) as opened:                           # from Python, too
        opened.load()
        if suffix != ".tif":
            assert np.abs(np.asarray(data.load_image(opened), int) - UPRIGHT).mean() < 3


def test_check_draws_turned_images_upright(tmp_path):
    """Guards: a picture to judge the boxes by that shows the image lying down."""
    region = {"phrase": "x", "boxes": [[60 / 90, 4 / 60, 84 / 90, 20 / 60]]}
    folder = write(tmp_path / "d", {**ROW, "image": "a.jpg", "regions": [region]}, image=False)
    save_turned(folder / "a.jpg", 6)
    assert data.check(folder, tmp_path / "sheet.png") == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"), int)
    assert sheet[60, 250].min() > 200 and sheet[250, 60].max() < 100        # in the box; far away


def test_several_frames_are_refused(tmp_path):
    """Guards: the second page of a TIFF or a GIF dropped without a word; a phone's MPO, a JPEG
    with a smaller picture behind it, refused."""
    page, other = Image.fromarray(UPRIGHT), Image.fromarray(UPRIGHT[::-1].copy())
    for name in ("a.tif", "a.gif", "a.webp", "a.png"):
        page.save(tmp_path / name, save_all=True, append_images=[other])
        with pytest.raises(InputError, match=f"{name}.* 2 frames; save the one to use as a PNG"):
            data.load_image(tmp_path / name)
    page.convert("RGB").save(tmp_path / "a.mpo", save_all=True, quality=95,
                             append_images=[other.convert("RGB")])
    assert Image.open(tmp_path / "a.mpo").n_frames == 2
    image = np.asarray(data.load_image(tmp_path / "a.mpo"), int)
    assert np.abs(image - UPRIGHT).mean() < 3


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


REPORTS = {
    "title and time": [
        "The left basal opacity is larger.", "Discussed with Dr. Lee by telephone at 10 p.m.",
        "The line ends in the atrium."],
    "titles and initials": [
        "Compared to Mrs. J. Doe's film.", "Read by R. B. Miller and Prof. Meyer.", "No change."],
    "figures, numbers and dates": [
        "See Fig. 2.", "Compared to radiograph no. 1.", "Film of Jan. 5.", "Comparison: no. 3."],
    "sides and comparisons": [
        "Rt. lung clear.", "Pneumonia vs. Atelectasis.", "Nodule (vs. 6 mm before).",
        "Mass, e.g. Lymphoma, i.e. Stage II."],
    "blanks": ["In comparison with ___.", "___ tube is in place.", "Dr. ___ was told at 3:15.",
               "(___ is known.)"],
    "Spanish": ["Sin cambios.", "Índice normal.", "Área clara, p. ej. Atelectasia.", "¿Edema?",
                "Único nódulo.", "Visto por la Dra. Núñez.", "Mide aprox. 3 cm.", "Ápex libre."],
    "French": ["Cœur normal.", "Épanchement gauche.", "À droite, rien."],
    "German": ["Z. n. Bypass.", "V. a. Pneumonie, z. B. Lingula.", "Übrige Lunge frei."],
    "Russian": ["Сердце не увеличено.", "Лёгкие чистые.", "Выпота нет."],
    "Greek": ["Η καρδιά είναι φυσιολογική.", "Άνω λοβός καθαρός."],
    "lower case": ["the heart is large .", "there is a 1.5 cm nodule .", "no effusion ."],
    "lower case after one capital": ["Heart is large.", "lungs are clear.", "PICC in place.",
                                     "no effusion."],
    "capitals": ["HEART NORMAL.", "LUNGS CLEAR.", "NO EFFUSION."],
    "brackets and quotes": ["The tube is low (see image 3.)", "[Stable.]", "“Clear lungs.”",
                            "‘Normal’ heart."],
    "decimals and vertebrae": ["Nodule of 1.2 x 3.4 cm.", "5.5 cm above the carina.",
                               "T12 is low.", "2 nodules."]}


@pytest.mark.parametrize("kind", REPORTS)
def test_reports_as_people_write_them_are_cut(kind):
    """Guards: a cut after a title, an initial, an abbreviation or in a number; no cut before
    letters beyond ASCII, brackets and blanks, or in a text of lower case."""
    assert data.split_sentences(" ".join(REPORTS[kind])) == REPORTS[kind]


@pytest.mark.parametrize("text, expected", [
    ("Clear lungs. IMPRESSION: 1. No edema. 2. Stable. 10. T12 is low. 11. 5 mm nodule.",
     ["Clear lungs.", "IMPRESSION: No edema.", "Stable.", "T12 is low.", "5 mm nodule."]),
    ("1) Clear lungs. 2) No effusion. (3) Normal heart.",
     ["Clear lungs.", "No effusion.", "Normal heart."]),
    ("1.Clear lungs. 2.No effusion.", ["Clear lungs.", "No effusion."]),
    ("Clear lungs. IMPRESSION: 1. stable heart. 2. no effusion.",
     ["Clear lungs.", "IMPRESSION: stable heart.", "no effusion."]),
    ("1. clear lungs. 2. no effusion.", ["clear lungs.", "no effusion."]),
    ("II. No effusion. III. Stable. IV. Normal.", ["No effusion.", "Stable.", "Normal."]),
    ("1. Edema; 2. Effusion; 3. Mass.", ["Edema;", "Effusion;", "Mass."]),
    ("See Fig. 2. As in no. 1. Since Jan. 5. Stable.",
     ["See Fig. 2.", "As in no. 1.", "Since Jan. 5.", "Stable."])])
def test_list_numbers_are_no_sentences(text, expected):
    """Guards: "1." as a sentence, so twice the sub-reports; two items in one; a number that belongs
    to the sentence lost."""
    assert data.split_sentences(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("心影不大。两肺清晰。未见“胸水。”", ["心影不大。", "两肺清晰。", "未见“胸水。”"]),
    ("1. 心影不大。2. 两肺清晰。", ["心影不大。", "两肺清晰。"]),
    ("1、心影不大；2、两肺清晰。", ["心影不大；", "两肺清晰。"]),
    ("心拡大なし．肺野清。", ["心拡大なし．", "肺野清。"]),
    ("हृदय सामान्य है। फेफड़े साफ हैं।", ["हृदय सामान्य है।", "फेफड़े साफ हैं।"]),
    ("Clear lungs.No effusion.Índice normal.", ["Clear lungs.", "No effusion.", "Índice normal."]),
    ("1.Clear lungs.2.No effusion.", ["Clear lungs.", "No effusion."]),
    ("Presentation: SOB. . Clear.. Stable...", ["Presentation: SOB.", "Clear..", "Stable..."]),
    ("", []), (" \n ", []), (" . ", []), ("1.", ["1."]), ("___", ["___"])])
def test_text_without_blanks_between_sentences_is_cut(text, expected):
    """Guards: Chinese, Japanese and Hindi reports as one sentence; a forgotten blank; a lone full
    stop as a sentence; a text that is only a number lost."""
    assert data.split_sentences(text) == expected


def test_numbered_reports_have_the_same_sentences(rows):
    """Guards: reports written "1. A. 2. B." with other sub-reports than "A. B.", so another R@1."""
    for row in rows:
        plain = data.split_sentences(row["report"])
        for style in ("{}. {}", "{}) {}", "({}) {}", "{}.{}"):
            items = [style.format(n, sentence) for n, sentence in enumerate(plain, 1)]
            assert data.split_sentences(" ".join(items)) == plain
            assert data.split_sentences("IMPRESSION: " + "\n".join(items)) == [
                "IMPRESSION: " + plain[0], *plain[1:]]


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

    def draw(report, regions, objectives="scgd"):
        return [task for task, *_ in data.sample_tasks(report, regions, objectives, 1, rng)]

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
        assert np.array_equal(sample["image"], picture)
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
    return {"image": np.full((2, 2), number, np.uint8), "text": text, "tasks": list(tasks)}


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
    assert batch["task_of_row"].tolist() == [data.TASKS.index(task) for task in "ggcd"]
    assert [spell(letters, row) for row in batch["text"]] == ["a b$__", "longe$", "$_____",
                                                              "x$____"]
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 2, 2)
    assert batch["image"][:, 1, 0].tolist() == [5, 6, 7, 8]
    assert "text" not in data.Collate(None, 6, letters, 6)(samples)


TEXT, FOUR = "One two. Three four.", "100 200 300 400; 500 600 700 800"


@pytest.mark.parametrize("target, most, expected", [
    (TEXT, 21, TEXT + "$"), (TEXT, 20, "One two.$"), (TEXT, 9, "One two.$"), (TEXT, 8, "One two$"),
    (FOUR, 33, FOUR + "$"), (FOUR, 32, "100 200 300 400$"), (FOUR, 16, "100 200 300 400$"),
    (FOUR + "; 900 900 999 999", 48, FOUR + "$"), ("1. One two. 2. Three four.", 20, "One two.$"),
    ("No full stop at all", 8, "No full$"), ("1. One two. 2. Three four.", 27,
                                            "1. One two. 2. Three four.$")])
def test_a_target_that_is_too_long_ends_whole(letters, target, most, expected):
    """Guards: a target cut in a box or a sentence, which teaches half a box or no end, so that
    report() never ends; a target that just fits cut; a limit off by one, with or without <eos>."""
    ids = data.target_ids(letters, target, most)
    assert spell(letters, ids) == expected and len(ids) <= most
    batch = data.Collate(None, 6, letters, most)([sample(0, "", ("c", "q", target))])
    assert spell(letters, batch["ids"][0]) == "q\n" + expected
    assert batch["is_target"].sum() == len(expected)


def test_cut_targets_are_counted(letters):
    """Guards: 242 of 278 notes cut without a word; a target that just fits counted; the texts of
    regions without boxes, and reports that are not there, which are no targets, counted."""
    boxes = [[.1, .2, .3, .4], [.5, .6, .7, .8]]                           # 32 letters, as FOUR
    rows = [{"report": "a" * 31, "regions": [{"phrase": "b" * 32, "boxes": boxes}]},
            {"report": "", "regions": [{"phrase": "c" * 99, "boxes": []}]},
            {"report": "é" * 16, "regions": []}]                           # 32 bytes
    assert data.count_cut_targets(letters, rows, 33) == (0, 4)
    assert data.count_cut_targets(letters, rows, 32) == (3, 4)
    for most in (17, 31, 32, 33):
        cut = sum(data.target_ids(letters, target, most)
                  != data.plain_ids(letters, target) + [letters.eos_token_id]
                  for target in ("a" * 31, "b" * 32, FOUR, "é" * 16))
        assert data.count_cut_targets(letters, rows, most) == (cut, 4)


def test_siglip_1_reads_no_punctuation(letters):
    """Guards: rows of Table 1 a little low, as SigLIP 1 and MedSigLIP were trained on texts without
    punctuation; SigLIP 2, which keeps it, changed too. Values: big_vision's canonicalize_text."""
    text = "The Heart, (mildly) enlarged:  non-specific; T12's \"1.5 cm\"."
    assert data.siglip_text(letters, text) == text.lower()
    letters.init_kwargs["drops_punctuation"] = True
    try:
        assert data.siglip_text(letters, text) == "the heart mildly enlarged nonspecific t12s 15 cm"
        data.plain_ids.cache_clear()
        [ids] = data.text_ids(letters, ["A, b."], 6)
        assert spell(letters, ids) == "a b$__"
    finally:
        del letters.init_kwargs["drops_punctuation"]
    assert spell(letters, data.text_ids(letters, ["A, b."], 7)[0]) == "a, b.$_"


def test_a_long_prompt_is_cut_and_said_once(letters, capsys):
    """Guards: a phrase of 20 KB that fills the memory, a prompt without its line break, or a note
    for each of a thousand rows."""
    data.say_once.cache_clear()
    for n in (254, 255):                                       # with the line break 255 and 256
        assert spell(letters, data.prompt_ids(letters, "p" * n)) == "p" * n + "\n"
    assert capsys.readouterr().err == ""
    for text in ("p" * 256, "ab" * 200, "abc" * 10_000):
        assert spell(letters, data.prompt_ids(letters, text)) == text[:255] + "\n"
    assert capsys.readouterr().err == "note: a prompt of over 256 tokens is cut to 256\n"


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


# ---- errors, files and tables --------------------------------------------------------------------

@pytest.mark.parametrize("error, line", [
    (InputError("no such file"), "x.py: no such file"), (KeyboardInterrupt(), "x.py: interrupted"),
    (OSError(28, "No space left on device", "a.png"), "x.py: .*No space left on device: 'a.png'"),
    (MemoryError(), "x.py: out of memory"), (torch.OutOfMemoryError("CUDA"), "x.py: out of memory"),
    (RuntimeError("a bug"), None), (ValueError("a bug"), None)])
def test_what_a_user_can_mend_is_one_line(monkeypatch, error, line):
    """Guards: a traceback for a full disk or a full GPU; a bug of ours hidden in one line."""
    monkeypatch.setattr(sys, "argv", ["/some/where/x.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))

    def main():
        raise error
    with pytest.raises(SystemExit if line else type(error), match=line or "a bug") as end:
        data.run_command(main)
    assert "\n" not in str(end.value)


def test_a_terminal_without_some_letters_is_no_error():
    """Guards: a run that ends with UnicodeEncodeError at the first Chinese report or path."""
    code = "import data; data.run_command(lambda: print('心影 é'))"
    for encoding, shown in (("ascii", b"?? ?"), ("cp1252", b"?? \xe9")):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 0 and done.stdout.strip() == shown


def test_ranges_name_their_flag():
    """Guards: NaN let through; a bound excluded; a flag that is not given, or not there, refused; a
    Python name instead of the flag's."""
    def said(**values):
        try:
            data.check_ranges(SimpleNamespace(**values), {"lam": (0, np.inf), "batch_size": (1, 8),
                                                          "ks": (1, 1e6)})
        except InputError as error:
            return str(error)
    assert said(batch_size=1) is said(batch_size=8, lam=0) is said(lam=None, ks=[1, 40]) is None
    assert said(batch_size=9) == "--batch-size 9: expected 1 to 8"
    assert said(lam=float("nan")) == "--lambda nan: expected 0 or more"
    assert said(ks=[5, 0]) == "--ks 0: expected 1 to 1,000,000"


def test_files_are_written_whole(tmp_path):
    """Guards: half a file after a full disk or a kill; a file lost because its successor could not
    be written; drafts left behind."""
    path = tmp_path / "new" / "a.json"
    data.write_json(path, {"a": 1})

    def fail(draft):
        draft.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match=r"a\.json: cannot be written \(No space left on device\)"):
        data.write_file(path, fail)
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(path.parent) == ["a.json"]


def test_an_output_is_not_the_image(tmp_path):
    """Guards: an X-ray replaced by its own overlay, by whatever name; a suffix that does not say
    what is in the file; a folder taken for a file."""
    image = tmp_path / "a.png"
    image.write_bytes(b"x-ray")
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "folder.png").mkdir()
    for name, words in (("a.png", "the image itself"), ("link.png", "the image itself"),
                        ("b.jpg", "expected a .png file"), ("folder.png", "expected a .png file")):
        with pytest.raises(InputError, match=words):
            data.check_output(tmp_path / name, ".png", image)
    data.check_output(tmp_path / "b.png", ".png", image)


def test_tables_are_aligned():
    """Guards: columns that do not stand under their names."""
    assert data.format_table([("Model", "R@1"), ("a", "100.00"), ("longer name", "7")]).split(
        "\n") == ["Model           R@1", "a            100.00", "longer name       7"]


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


def test_phantom_of_a_process_pool_is_the_same(tmp_path):
    """Guards: bytes that depend on which process draws; rows in the order in which they end; a pool
    that works with fork alone (macOS and Windows spawn); workers that import torch."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "draw.py").write_text(
        "import multiprocessing, data\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    data.ONE_PROCESS = 9\n"
        "    data.make_phantom('pool', {'train': 60, 'test': 3}, 5, quiet=True)\n")
    done = subprocess.run([sys.executable, "draw.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 0, done.stderr
    one = data.make_phantom(tmp_path / "one", {"train": 60, "test": 3}, 5, quiet=True)
    for path in [one / "manifest.jsonl", *(one / "images").iterdir()]:
        assert path.read_bytes() == (tmp_path / "pool" / path.relative_to(one)).read_bytes()
    assert len(list((tmp_path / "pool" / "images").iterdir())) == 63


def test_phantom_is_rich_and_its_phrase_prior_low(tmp_path, monkeypatch):
    """Guards: a phantom whose phrases give the boxes away, whose reports repeat, or say the
    body's position always, never or in few words; a label of what is not there, or twice."""
    monkeypatch.setattr(data.Canvas, "mask", lambda *_, **__: 0)       # the rows need no picture
    (tmp_path / "images").mkdir()
    train, test = ([data.draw_phantom(tmp_path, 0, (split, i), 16) for i in range(n)]
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
        phrases = " ".join(region["phrase"] for region in row["regions"]).lower()
        assert sorted(row["labels"]) == sorted(               # what the boxes show, by its words
            {"heart": "cardiomegaly"}.get(kind, kind) for kind in (
                "nodule", "cavity", "consolidation", "pleural effusion", "pneumothorax",
                "pacemaker", "heart") if kind in phrases)
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
