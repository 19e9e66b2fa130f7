"""The converters, on small trees of the shape of the hospitals' archives with their odd cases."""

import csv
import gzip
import io
import json
import sys
import uuid
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
from conftest import run
from data import InputError

NAN = float("nan")


# ---- a tree of MIMIC-CXR-JPG, LLaVA-Rad, CheXmask and MIMIC-Ext-CXR-QBA --------------------------

W, H = 160, 200                                        # of every image
#        dicom  patient     study       split       view       Dice RCA (Mean)
IMAGES = [("a1", "10000001", "50000001", "train",    "PA",      "0.95"),
         ("a2", "10000001", "50000001", "train",    "AP",      "0.7"),
         ("a3", "10000001", "50000001", "train",    "LATERAL", "0.9"),
         ("b1", "10000002", "50000002", "train",    "AP",      "0.6999"),
         ("b2", "10000002", "50000002", "train",    "AP",      None),
         ("b3", "10000002", "50000002", "train",    "AP",      ""),
         ("c1", "10000003", "50000003", "train",    "PA",      "0.8"),
         ("c2", "10000003", "50000004", "train",    "PA",      "0.8"),
         ("d1", "10000004", "50000005", "train",    "PA",      "0.8"),
         ("d2", "10000004", "50000005", "train",    "PA",      "0.8"),
         ("e1", "11000005", "50000006", "validate", "AP",      "0.8"),
         ("f1", "11000006", "50000007", "test",     "PA",      "0.8"),
         ("f2", "11000006", "50000007", "test",     "",        "0.8")]
PLACE = {dicom: f"p{patient[:2]}/p{patient}/s{study}/{dicom}.jpg"
         for dicom, patient, study, *_ in IMAGES}


def entry(dicom, findings, impression=None, method="gpt4", **more):
    """An entry of LLaVA-Rad."""
    patient, study = PLACE[dicom].split("/")[1:3]
    return {"id": f"{patient[1:]}_{study[1:]}", "image": f"mimic/{PLACE[dicom]}",
            "generate_method": method, "reason": None, "impression": impression, "view": "PA",
            "chexpert_labels": {"Edema": NAN, "Pneumonia": -1.0, "Fracture": 1.0,
                                "Lung Opacity": 0.0, "Support Devices": 1},
            "conversations": [{"from": "human", "value": "<image>\nDescribe.\n"},
                              {"from": "gpt", "value": findings}], **more}


TEXTS = {
    "train": [entry("a1", "The heart is\n enlarged.  ", "Cardiomegaly."),
              entry("a1", "Rule-based text.", method="rule-based"),
              entry("a2", "The heart is enlarged.", NAN), entry("a2", "Twice."),
              entry("a3", "Seen from the side."), entry("b1", "Low quality."),
              entry("b2", "Not in CheXmask."), entry("b3", "Without a score."),
              entry("c1", NAN, None), entry("c2", NAN, "Only an impression."),
              entry("d1", "No image."), entry("d2", "Half an image.")],
    "dev": [entry("e1", "Small left effusion.", view=NAN),
            {**entry("e1", "", method="rule-based"), "conversations": []}],
    "test": [entry("f1", "Clear lungs.", "Normal.", method="rule-based", view=None,
                   chexpert_labels=None),
             entry("f2", "No view.", method="rule-based")]}


def answer(text, boxes, dicoms=("a1",), place=(), **more):
    """An answer of MIMIC-Ext-CXR-QBA with boxes in pixels on some images of its study."""
    return {"answer_id": "x", "answer_level": 0, "text": text, "positiveness": "pos",
            "from_report": True, "sub_answers": [], "localization": {
                dicom: {"image_id": dicom, "bboxes": boxes, "is_fallback": False, **dict(place)}
                for dicom in dicoms}, **more}


HEART, TWIN = [40.0, 100.0, 120.0, 160.0], [48.0, 100.0, 128.0, 160.0]        # IoU 9/11
QUESTIONS = {
    "s50000001": [
        ("B01", [answer("The heart is  enlarged.", [HEART, TWIN], ("a1", "a2", "a3")),
                 answer("Both lungs.", [[0, 20, 60, 150], [90, 20, 170, 150], [10, 210, 20, 230]],
                        sub_answers=[answer("A part.", [HEART], sub_answers=[
                            answer("A part of it.", [HEART])])]),
                 answer("No effusion.", [HEART], positiveness="neg"),
                 answer("From a template.", [HEART], from_report=False),
                 answer("Fallback.", [HEART], place={"is_fallback": True}.items()),
                 answer("Empty.", []), answer("Outside.", [[200, 0, 300, 50], [9, 9, 9, 50]]),
                 answer(None, [HEART]), {"text": "Keys are absent."},
                 {"text": "No lists.", "localization": {"a1": {}}}]),
        ("B02", [answer("The heart is enlarged.", [[0, 0, 10, 10]]),          # the text again
                 {"text": "Few keys.", "localization": {"a2": {"bboxes": [[16, 20, 32, 40]]}}}]),
        ("C03", [answer("Not of this rating.", [HEART])])],
    "s50000006": [("B01", [answer("Of another rating here.", [HEART], ["e1"])]),
                  ("B02", [answer("Small left effusion.", [HEART], ["e1"])])],
    "s50000002": [("B01", [answer("Of a image dropped.", [HEART], ["b1"])])]}
RATED = {"App": [("s50000001", "B01"), ("50000001", "B02"), ("s50000006", "B02"),
                 ("s50000002", "B01")],                # an id may lack its prefix
         "Ap": [("s50000001", "C03"), ("s50000006", "B01")]}

HEART_REGION = {"phrase": "The heart is enlarged.", "boxes": [[0.275, 0.5, 0.775, 0.8]]}
LUNGS_REGION = {"phrase": "Both lungs.", "boxes": [[0, 0.1, 0.375, 0.75], [0.5625, 0.1, 1, 0.75]]}
EXPECTED = [                                             # by hand from the tables above
    ("a1", "train", "The heart is enlarged. Cardiomegaly.", [HEART_REGION, LUNGS_REGION]),
    ("a2", "train", "The heart is enlarged.",
     [HEART_REGION, {"phrase": "Few keys.", "boxes": [[0.1, 0.1, 0.2, 0.2]]}]),
    ("c2", "train", "Only an impression.", []),
    ("e1", "val", "Small left effusion.",
     [{"phrase": "Small left effusion.", "boxes": [[0.25, 0.5, 0.75, 0.8]]}]),
    ("f1", "test", "Clear lungs. Normal.", [])]
FUNNEL = {                                             # train, val, test; by hand too
    "images": {"in": [12, 2, 2], "other method": [1, 1, 0], "view": [1, 0, 1],
               "quality": [3, 0, 0], "no text": [1, 0, 0], "repeated image": [1, 0, 0],
               "no image": [1, 0, 0], "unreadable image": [1, 0, 0]},
    "pairs": {"in": [13, 2, 0], "not positive": [1, 0, 0],
              "not in report": [1, 0, 0], "fallback box": [1, 0, 0], "no box": [2, 0, 0],
              "degenerate box": [1, 0, 0], "no text": [1, 0, 0], "repeated text": [1, 0, 0],
              "rating": [1, 1, 0]},
    "boxes": {"in": [10, 1, 0], "degenerate box": [3, 0, 0], "merged": [2, 0, 0]},
    "out": {"images": [3, 1, 1], "boxed images": [2, 1, 0], "studies": [2, 1, 1],
            "boxed studies": [1, 1, 0], "patients": [2, 1, 1], "reports": [3, 1, 1],
            "pairs": [4, 1, 0], "boxes": [5, 1, 0]}}


def drawn(seed, size=(W, H)):
    """A smooth image with a bright corner at its upper left."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((255 * (1 - .4 * x - .5 * y) * (1 - .05 * (seed % 3))).astype(np.uint8))


def write_table(path, header, rows, bom=True):
    """A csv, gzipped by its name, with a byte order mark and CRLF."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = (b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_questions(folder, lead):
    """qa.zip, or qa/ for lead None, with other files in it and App next to it."""
    files = {f"{lead or ''}p1{study[5]}/p1/{study}.qa.json":
             json.dumps({"study_id": study, "questions": [
                 {"question_id": name, "answers": answers} for name, answers in questions]})
             for study, questions in QUESTIONS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if lead is None:
        for name, text in files.items():
            (folder / "qa" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "qa" / name).write_text(text)
    else:
        with zipfile.ZipFile(folder / "qa.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in (files | {f"{lead}dataset_info.json": "{}"}).items():
                archive.writestr(name, text)
    for table, pairs in RATED.items():
        write_table(folder / "metadata" / table / "question_metadata.csv.gz",
                    ["question.quality.rating", "question_id", "patient_id", "study_id"],
                    [["?", question, "p1", study] for study, question in pairs])


def mimic_tree(root, lead="", gz=".gz"):
    """The four archives below root -> the command line that prepares them."""
    jpg = root / "mimic-cxr-jpg"
    for n, (dicom, *_) in enumerate(IMAGES):
        path = jpg / "files" / PLACE[dicom]
        path.parent.mkdir(parents=True, exist_ok=True)
        if dicom != "d1":
            drawn(n).save(path, quality=95)
    half = jpg / "files" / PLACE["d2"]
    half.write_bytes(half.read_bytes()[:700])
    write_table(jpg / f"mimic-cxr-2.0.0-split.csv{gz}",
                ["dicom_id", "study_id", "subject_id", "split"],
                [[dicom, study, patient, split] for dicom, patient, study, split, *_ in IMAGES])
    write_table(jpg / f"mimic-cxr-2.0.0-metadata.csv{gz}",
                ["dicom_id", "subject_id", "ViewPosition", "Rows", "Columns", "StudyDate"],
                [[dicom, patient, view, H, W, 2180] for dicom, patient, _, _, view, _ in IMAGES])
    write_table(root / f"MIMIC-CXR-JPG.csv{gz}",
                ["dicom_id", "Dice RCA (Max)", "Dice RCA (Mean)", "Landmarks", "Left Lung"],
                [[dicom, "0.99", dice, "1,2,3", "129656 10 " * 20_000 * (dicom == "a1")]
                 for dicom, *_, dice in IMAGES if dice is not None])
    (root / "llava-rad" / "1.0.0").mkdir(parents=True)
    for split, entries in TEXTS.items():
        name = f"chat_{split}_MIMIC_CXR_all_gpt4extract_rulebased_v1.json"
        (root / "llava-rad" / "1.0.0" / name).write_text(json.dumps(entries))
    write_questions(root / "qba" / "exports" / "A_frontal", lead)
    return ["mimic-cxr", "--images", jpg, "--llava-rad", root / "llava-rad", "--qba", root / "qba",
            "--chexmask", root / f"MIMIC-CXR-JPG.csv{gz}", "--workers", 1, "--out", root / "out"]


# ---- running a converter -------------------------------------------------------------------------

def convert(monkeypatch, command, *more):
    """Run data.py in this process -> rows of the manifest, prepare.json."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, command), *map(str, more)])
    data.main()
    out = Path(str(command[command.index("--out") + 1]))
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return rows, json.loads((out / "prepare.json").read_text())


def fails(monkeypatch, command, *more):
    """The one line of a run that must fail and leave neither manifest nor half a file."""
    with pytest.raises(InputError) as error:
        convert(monkeypatch, command, *more)
    out = Path(str(command[command.index("--out") + 1]))
    assert not (out / "manifest.jsonl").exists() and not list(out.rglob("*.tmp"))
    assert "\n" not in str(error.value)
    return str(error.value)


def without(command, *flags):
    """A command without some flags and their values."""
    places = {i for flag in flags for i in (command.index(flag), command.index(flag) + 1)}
    return [word for i, word in enumerate(command) if i not in places]


def balanced(funnel):
    """Whether what came in is what was dropped and what is left, in each table and split."""
    for table in funnel.keys() - {"out"}:
        for split in data.SPLITS:
            counts = {reason: by[split] for reason, by in funnel[table].items()}
            assert 2 * counts["in"] == sum(counts.values()) + funnel["out"][table][split], table
    return True


@pytest.fixture
def mimic(tmp_path):
    return mimic_tree(tmp_path)


# ---- mimic-cxr -----------------------------------------------------------------------------------

def test_mimic_manifest_and_funnel_are_those_written_by_hand(monkeypatch, mimic, tmp_path, capsys):
    """Guards: both methods counted, laterals, NaN as text, a question id that repeats in another
    study, sub-answers, fallback boxes, fused twins, boxes beyond the image, columns by place;
    labels that are uncertain (-1), denied (0) or not mentioned (NaN)."""
    rows, notes = convert(monkeypatch, mimic)
    expected = [{"image": f"images_512/{PLACE[dicom]}", "study": PLACE[dicom].split("/")[2],
               "patient": PLACE[dicom].split("/")[1], "split": split, "report": report,
               "regions": regions, "labels": [] if dicom == "f1" else
               ["Fracture", "Support Devices"]} for dicom, split, report, regions in EXPECTED]
    assert rows == expected
    assert notes["funnel"] == {table: {reason: dict(zip(data.SPLITS, n)) for reason, n in
                                       reasons.items()} for table, reasons in FUNNEL.items()}
    assert balanced(notes["funnel"])
    printed = capsys.readouterr().out
    table = [line.split() for line in printed.splitlines()]
    assert ["images", "in", "12", "2", "2"] in table and ["out", "boxes", "5", "1", "0"] in table
    assert "python data.py check" in printed.splitlines()[-1]
    said = " ".join(notes["lost"])                 # of the test file; c2's and f1's studies
    assert "its rule-based texts" in said and "2 studies" in said and len(notes["lost"]) == 2
    assert data.check(tmp_path / "out", tmp_path / "sheet.png") == 0
    train = data.ChestXrays(data.read_manifest(tmp_path / "out", "train"), 32, "g")
    assert [len(train[(0, i)]["tasks"]) for i in range(3)] == [1, 1, 0]    # c2 has no boxes


@pytest.mark.parametrize("lead, gz, workers", [("qa/", "", 2), (None, ".gz", 1)])
def test_releases_that_differ_give_the_same_rows(monkeypatch, tmp_path, lead, gz, workers):
    """Guards: a leading folder in the zip, an unpacked folder or table, the order of workers; files
    that nobody asked for."""
    rows, _ = convert(monkeypatch, mimic_tree(tmp_path, lead, gz), "--size", 80, "--workers",
                      workers)
    assert [(Path(row["image"]).stem, row["split"], row["report"], row["regions"])
            for row in rows] == EXPECTED
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "images_80", "manifest.jsonl", "prepare.json"]


def test_images_are_shrunk_once(monkeypatch, mimic, tmp_path):
    """Guards: boxes tied to the small image's pixels, images turned, stretched or enlarged, images
    made again by a second run, another size taken for the one asked for."""
    rows, notes = convert(monkeypatch, mimic, "--size", 80, "--workers", 2)
    out = tmp_path / "out"
    assert [(row["split"], row["report"], row["regions"]) for row in rows] == [
        expected[1:] for expected in EXPECTED]
    assert notes["arguments"]["size"] == "80" and balanced(notes["funnel"])
    with Image.open(out / rows[0]["image"]) as small:
        assert small.size == (80, 100) and small.mode == "L"
        expected = np.asarray(drawn(0).resize((80, 100), Image.Resampling.BILINEAR), float)
        assert abs(np.asarray(small, float) - expected).max() < 6
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    manifest = (out / "manifest.jsonl").read_bytes()
    gone = out / rows[1]["image"]
    gone.unlink()
    (out / "manifest.jsonl").unlink()                          # a run that is stopped has none
    convert(monkeypatch, mimic, "--size", 80)
    assert {p for p, t in made.items() if p.stat().st_mtime_ns == t} == set(made) - {gone}
    assert gone.exists() and (out / "manifest.jsonl").read_bytes() == manifest
    (out / "manifest.jsonl").unlink()
    rows, _ = convert(monkeypatch, mimic, "--size", 300)
    assert Image.open(out / rows[0]["image"]).size == (W, H)


def test_an_interrupted_run_goes_on_where_it_was(monkeypatch, mimic, tmp_path):
    """Guards: a manifest before its images, images made again, half a image taken for a whole."""
    jobs, shrink = [], data.shrink

    def stop_at_third(job):
        jobs.append(job)
        if len(jobs) > 2:
            raise KeyboardInterrupt
        return shrink(job)

    monkeypatch.setattr(data, "shrink", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        convert(monkeypatch, mimic, "--size", 80)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.jpg")}
    assert len(made) == 2
    half = tmp_path / "out" / "images_80" / PLACE["c2"]
    half.parent.mkdir(parents=True)
    half.with_name("c2.jpg.tmp").write_bytes(b"half")
    monkeypatch.setattr(data, "shrink", shrink)
    rows, notes = convert(monkeypatch, mimic, "--size", 80)
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert [row["report"] for row in rows] == [expected[2] for expected in EXPECTED]
    assert balanced(notes["funnel"])


def test_what_is_left_out_is_said(monkeypatch, mimic, tmp_path):
    """Guards: a source that is required though the paper's set does without it, a silent loss."""
    rows, notes = convert(monkeypatch, without(mimic, "--qba", "--chexmask"), "--size", 80)
    assert [Path(row["image"]).stem for row in rows] == ["a1", "a2", "b1", "b2", "b3", "c2", "e1",
                                                         "f1"]
    assert not any(row["regions"] for row in rows)
    assert "--qba" in notes["lost"][0] and "--chexmask" in notes["lost"][1]


def test_fusion_is_as_asked_for(monkeypatch, mimic):
    """Guards: a flag that does nothing."""
    rows, _ = convert(monkeypatch, mimic, "--size", 80, "--wbf-iou", 0.9)
    assert rows[0]["regions"][0]["boxes"] == [[0.25, 0.5, 0.75, 0.8], [0.3, 0.5, 0.8, 0.8]]


# ---- padchest-gr ---------------------------------------------------------------------------------

FINDINGS = {
    "i1": [{"sentence_en": "Small  left pleural effusion.", "sentence_es": "x", "abnormal": True,
            "boxes": [[0.6, 0.62, 0.83, 0.8], [0.9, 0.9, 1.2, 0.95], [0.5, 0.4, 0.5, 0.6]],
            "extra_boxes": [[0, 0, 1, 1]], "labels": ["pleural effusion"], "progression": None},
           {"sentence_en": "No pneumothorax", "abnormal": False},
           {"sentence_en": "Nodule.", "abnormal": True, "boxes": [[0.2, 0.2, 0.2, 0.3]],
            "labels": ["nodule", "pleural effusion"]}],
    "i2": [{"sentence_en": "Normal.", "abnormal": False, "boxes": []}],
    "i3": [{"sentence_en": "Cardiomegaly.", "boxes": [[0.25, 0.5, 0.75, 1.0]]},
           {"sentence_en": "Cardiomegaly.", "boxes": [[0.25, 0.5, 0.75, 0.875]]}],
    "i4": [{"sentence_en": "No image."}], "i5": [{"sentence_en": None}],
    "i6": [{"sentence_en": "Not in the table."}]}
PADCHEST = [                                           # image, official split, report, regions
    ("i1", "train", "Small left pleural effusion. No pneumothorax. Nodule.",
     [{"phrase": "Small left pleural effusion.",
       "boxes": [[0.6, 0.62, 0.83, 0.8], [0.9, 0.9, 1, 0.95]]}]),
    ("i2", "val", "Normal.", []),
    ("i3", "test", "Cardiomegaly. Cardiomegaly.",
     [{"phrase": "Cardiomegaly.", "boxes": [[0.25, 0.5, 0.75, 1]]},
      {"phrase": "Cardiomegaly.", "boxes": [[0.25, 0.5, 0.75, 0.875]]}])]


def padchest_tree(root, zipped):
    """PadChest-GR below root, its PNGs and table zipped or not -> the command line."""
    images = root / "files" / "PadChest_GR"
    images.mkdir(parents=True)
    for n, name in enumerate(("i1", "i2", "i3", "i6")):
        deep = np.asarray(drawn(n), np.uint16) * 10 + 800           # 12 of 16 bits
        Image.fromarray(deep).save(images / f"{name}.png")
    header = ["StudyID", "ImageID", "label", "sentence_en", "split", "PatientID"]
    split = dict(i1="train", i2="validation", i3="test", i4="train", i5="train")
    write_table(root / "master_table.csv", header, [
        [f"study {name}", f"{name}.png", label, 'a, "b"\nc', split[name], f"patient {name}"]
        for name in split for label in ("nodule", "Normal")])
    (root / "reports.json").write_text(json.dumps([
        {"StudyID": f"study {name}", "ImageID": f"{name}.png", "findings": findings}
        for name, findings in FINDINGS.items()], indent=1))
    if zipped:
        for target, top in (("images.zip", images), ("master_table.csv.zip",
                                                     root / "master_table.csv")):
            with zipfile.ZipFile(root / target, "w") as archive:
                archive.writestr("__MACOSX/._i1.png", b"x")
                archive.writestr("__MACOSX/._master_table.csv", b"x")
                for path in [top] if top.is_file() else top.iterdir():
                    archive.write(path, f"PadChest_GR/{path.name}")
    return ["padchest-gr", "--images", root / ("images.zip" if zipped else "files"), "--reports",
            root / "reports.json", "--table", root / ("master_table.csv" + ".zip" * zipped),
            "--workers", 2, "--out", root / "out"]


@pytest.mark.parametrize("zipped", [False, True])
def test_padchest_manifest_is_the_one_written_by_hand(monkeypatch, tmp_path, zipped):
    """Guards: x and y swapped, the second reader's boxes, healthy sentences lost from the report,
    absent keys, black 16-bit images, a pool without the validation split; a label of two sentences
    twice; one sentence of two boxes read as two regions."""
    command = padchest_tree(tmp_path, zipped)
    rows, notes = convert(monkeypatch, command)
    assert rows == [{"image": f"images_512/{name}.jpg", "study": f"study {name}",
                     "patient": f"patient {name}", "split": "train" if split == "val" else split,
                     "report": report, "regions": regions,
                     "labels": ["pleural effusion", "nodule"] if name == "i1" else []}
                    for name, split, report, regions in PADCHEST]
    assert balanced(notes["funnel"])
    assert notes["funnel"]["pairs"] == {
        "in": dict(train=4, val=0, test=2), "no box": dict(train=2, val=0, test=0),
        "degenerate box": dict(train=1, val=0, test=0)}
    [read] = data.read_manifest(tmp_path / "out", "test")
    assert read["regions"] == [{"phrase": "Cardiomegaly.", "boxes": [
        [0.25, 0.5, 0.75, 1], [0.25, 0.5, 0.75, 0.875]]}]
    small = np.asarray(Image.open(tmp_path / "out" / rows[0]["image"]), int)
    assert small.shape == (H, W) and small.max() > 250 and small.min() < 5 and small[0, 0] > 240
    assert data.check(tmp_path / "out", tmp_path / "sheet.png") == 0


def test_padchest_without_its_table(monkeypatch, tmp_path):
    """Guards: patients or splits made up in silence."""
    rows, notes = convert(monkeypatch, without(padchest_tree(tmp_path, zipped=True), "--table"))
    assert [Path(row["image"]).name for row in rows] == ["i1.jpg", "i2.jpg", "i3.jpg", "i6.jpg"]
    assert {row["split"] for row in rows} == {"train"} and "--table" in notes["lost"][0]
    assert all(row["patient"] == row["study"] for row in rows)


def test_padchest_boxes_in_pixels_are_refused(monkeypatch, tmp_path):
    """Guards: a release with another box format clipped to the whole image in silence."""
    command = padchest_tree(tmp_path, zipped=False)
    (tmp_path / "reports.json").write_text(json.dumps([{"ImageID": "i1.png", "findings": [
        {"sentence_en": "A.", "boxes": [[10, 20, 300, 400]]}]}]))
    assert "pixels" in fails(monkeypatch, command)


# ---- ms-cxr --------------------------------------------------------------------------------------

MS_ROWS = [("a1", "Edema", "mild  edema", 16, 20, 80, 100), ("a1", "Edema", "mild edema", 0, 0,
                                                                   40, 50),
           ("a1", "Pneumonia", "mild edema", 16, 20, 80, 100), ("e1", "Edema", "edema", 80, 100,
                                                                 160, 20),
           ("f1", "Edema", "at the edge", 160, 0, 10, 10), ("d1", "Edema", "no image", 0, 0, 9, 9)]


@pytest.mark.parametrize("split", [None, "test"])
def test_ms_cxr_manifest_is_the_one_written_by_hand(monkeypatch, mimic, tmp_path, split):
    """Guards: width and height taken for corners, a row a box, a box of one phrase in two
    categories expected twice, a category lost or listed twice."""
    header = ["dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h", "image_width",
              "image_height"] + ["split"] * bool(split)
    write_table(tmp_path / "ms.csv", header, [
        [dicom, kind, text, f"files/{PLACE[dicom]}", *box, W, H] + [split] * bool(split)
        for dicom, kind, text, *box in MS_ROWS])
    rows, notes = convert(monkeypatch, ["ms-cxr", "--images", tmp_path / "mimic-cxr-jpg", "--table",
                                        tmp_path / "ms.csv", "--out", tmp_path / "ms"])
    first, second = [0.1, 0.1, 0.6, 0.6], [0, 0, 0.25, 0.25]
    regions = [[{"phrase": "mild edema", "boxes": [first, second]}],
               [{"phrase": "edema", "boxes": [[0.5, 0.5, 1, 0.6]]}], []]
    assert [row["labels"] for row in rows] == [["Edema", "Pneumonia"], ["Edema"], ["Edema"]]
    rows = data.read_manifest(tmp_path / "ms")
    splits = [split] * 3 if split else ["train", "val", "test"]
    assert [(row["image"], row["split"], row["report"], row["regions"]) for row in rows] == [
        (f"images_512/{PLACE[dicom]}", *more) for dicom, *more in
        zip(("a1", "e1", "f1"), splits, [""] * 3, regions)]
    assert balanced(notes["funnel"]) and notes["lost"] == []


# ---- covid-cxr -----------------------------------------------------------------------------------

NOTE = 'He said "cough".\nThe  lungs, both,\nare clear.'
COVID = [  # patient, view, modality, file, licence, note
    ("1", "PA", "X-ray", "a.jpg", "CC BY-NC-SA", NOTE), ("1", "AP", "X-ray", "b.png", "", NOTE),
    ("4", "AP Supine", "X-ray", "c.jpeg", "", ""), ("2", "L", "X-ray", "d.jpg", "", "Lateral."),
    ("2", "Axial", "CT", "e.nii.gz", "", "A CT."), ("2", "PA", "X-ray", "f.jpg", "CC BY-NC-ND 4.0",
                                                    "Not to be changed."),
    ("2", "PA", "X-ray", "gone.jpg", "", "No file."), ("2", "PA", "X-ray", "g.png.gz", "", "Zip."),
    ("3", "PA", "X-ray", "h.webp-1.png", "", "One lung."), ("3", "PA", "X-ray", "i.jpg", "", ""),
    ("1", "PA", "X-ray", "a.jpg", "", "Again."), ("", "PA", "X-ray", "j.jpg", "", "No patient.")]
BOXES = [  # file, category, x, y, w, h; of images of 160 x 200
    ("a.jpg", 1, 16, 20, 48, 100), ("a.jpg", 2, 80, 20, 64, 160),
    ("b.png", None, 80, 20, 64, 160), ("b.png", None, 16, 20, 48, 100),
    ("c.jpeg", 2, -8, -10, 72, 110), ("c.jpeg", 1, 80, 100, 96, 120), ("h.webp-1.png", 2, 80, 100,
                                                                       40, 50),
    ("j.jpg", None, 0, 0, 10, 10), ("i.jpg", 1, None, None, None, None)]
RIGHT, LEFT = "Right lung.", "Left lung."
COVID_EXPECTED = [  # file, patient, report, regions
    ("a.jpg", "1", 'He said "cough". The lungs, both, are clear.',
     [(RIGHT, [0.1, 0.1, 0.4, 0.6]), (LEFT, [0.5, 0.1, 0.9, 0.9])]),
    ("b.jpg", "1", 'He said "cough". The lungs, both, are clear.',
     [(RIGHT, [0.1, 0.1, 0.4, 0.6]), (LEFT, [0.5, 0.1, 0.9, 0.9])]),
    ("c.jpg", "4", "", [(RIGHT, [0, 0, 0.4, 0.5]), (LEFT, [0.5, 0.5, 1, 1])]),
    ("h.webp-1.jpg", "3", "One lung.", [(LEFT, [0.5, 0.5, 0.75, 0.75])]),
    ("j.jpg", "j.jpg", "No patient.", [])]


FINDINGS_OF = {"a.jpg": "Pneumonia/Viral/COVID-19", "b.png": "No Finding", "c.jpeg": "todo",
               "h.webp-1.png": "Tuberculosis", "j.jpg": "Unknown"}


def covid_tree(root, early=False):
    """The repository's files below root -> the command line."""
    repo = root / "repo"
    for name in ("images", "annotations"):
        (repo / name).mkdir(parents=True)
    for n, (_, _, _, name, *_) in enumerate(COVID):
        if name.endswith(".gz"):
            (repo / "images" / name).write_bytes(gzip.compress(b"not an image"))
        elif name != "gone.jpg":
            drawn(n).save(repo / "images" / name)
    header = ["patientid", "view", "modality", "folder", "filename", "url", "license",
              "clinical_notes", "finding"]
    rows = [[patient, view, modality, "images", name, "https://x", licence, note,
             FINDINGS_OF.get(name, "")]
            for patient, view, modality, name, licence, note in COVID]
    if early:                                          # no modality or folder, and other names
        header = ["Patientid", "view", "filename", " url", "license", "notes"]
        rows = [[row[0], row[1], *row[4:8]] for row in rows]
    write_table(repo / "metadata.csv", header, rows, bom=False)
    files = [row[3] for row in COVID]
    notes = [{"image_id": files.index(name), "bbox": bbox} | ({"category_id": kind} if kind else {})
             for name, kind, *bbox in BOXES]
    coco = {"images": [{"id": n, "file_name": name, "width": W, "height": H}
                       for n, name in enumerate(files)], "annotations": notes}
    (repo / "annotations" / "imageannotation_ai_lung_bounding_boxes.json").write_text(
        json.dumps(coco))
    return ["covid-cxr", "--repo", repo, "--workers", 1, "--out", root / "out"]


@pytest.mark.parametrize("early", [False, True])
def test_covid_manifest_is_the_one_written_by_hand(monkeypatch, tmp_path, early):
    """Guards: a lung named by its place in the list, x, y, w, h taken for corners, boxes beyond the
    image, notes cut at a line break, CT and lateral images, a licence that forbids changes;
    "no finding" as a finding."""
    rows, notes = convert(monkeypatch, covid_tree(tmp_path, early))
    assert [(row["image"], row["patient"], row["report"],
             [(region["phrase"], *region["boxes"]) for region in row["regions"]])
            for row in rows] == [(f"images_512/{name}", *more) for name, *more in COVID_EXPECTED]
    assert balanced(notes["funnel"]) and data.check(tmp_path / "out", tmp_path / "s.png") == 0
    dropped = {reason: sum(by.values()) for reason, by in notes["funnel"]["images"].items()}
    assert dropped == {"in": 12, "licence": 1, "no image": 1, "unreadable image": 1, "no text": 1,
                       "repeated image": 1,
                       **({"view": 2} if early else {"view": 1, "not X-ray": 1})}
    assert [row["labels"] for row in rows] == ([[]] * 5 if early else [
        ["Pneumonia", "Viral", "COVID-19"], [], [], ["Tuberculosis"], []])
    studies = [row["study"] for row in rows]
    assert studies[0] == studies[1] and len(set(studies)) == 4     # one note of one patient
    with open(tmp_path / "out" / "LICENSES.csv", newline="") as file:
        licences = list(csv.DictReader(file))
    assert [(line["image"], line["licence"]) for line in licences] == [
        (row["image"], "CC BY-NC-SA" if n == 0 else "unstated") for n, row in enumerate(rows)]


def test_covid_patients_keep_their_split(monkeypatch, tmp_path):
    """Guards: a split by Python's hash, which changes with the process, or of other shares."""
    command = covid_tree(tmp_path)
    image = (tmp_path / "repo" / "images" / "a.jpg").read_bytes()
    for n in range(200):
        (tmp_path / "repo" / "images" / f"{n}.jpg").write_bytes(image)
    write_table(tmp_path / "repo" / "metadata.csv", [
        "filename", "view", "modality", "folder", "url", "license", "patientid", "clinical_notes"],
        [[f"{n}.jpg", "PA", "X-ray", "images", "", "", str(n), "A note."] for n in range(200)])
    rows, _ = convert(monkeypatch, command, "--size", 8)
    splits = [row["split"] for row in rows]
    assert 25 <= splits.count("test") <= 55 and splits.count("train") == 200 - splits.count("test")
    assert [n for n in range(20) if splits[n] == "test"] == [6, 12]


@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_images_are_shrunk_upright(monkeypatch, tmp_path, orientation):
    """Guards: a photograph shrunk lying down, its upright boxes then beside the lungs; a tag kept
    that turns the small image again; the long side taken for the short one."""
    command = covid_tree(tmp_path)
    upright = np.asarray(drawn(0))                             # 160 x 200, bright at upper left
    stored = upright[::-1, ::-1] if orientation == 3 else upright[:, ::-1].T
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(
        tmp_path / "repo" / "images" / "a.jpg", exif=exif, quality=95)
    rows, _ = convert(monkeypatch, command, "--size", 80)
    with Image.open(tmp_path / "out" / rows[0]["image"]) as small:
        assert small.size == (80, 100) and 0x0112 not in small.getexif()
        expected = np.asarray(drawn(0).resize((80, 100), Image.Resampling.BILINEAR), float)
        assert abs(np.asarray(small, float) - expected).max() < 8
    assert rows[0]["regions"][0] == {"phrase": RIGHT, "boxes": [[0.1, 0.1, 0.4, 0.6]]}


def test_images_of_several_frames_are_left_out(monkeypatch, tmp_path, capsys):
    """Guards: the first page of two converted without a word."""
    command = covid_tree(tmp_path)
    drawn(0).save(tmp_path / "repo" / "images" / "b.png", save_all=True, append_images=[drawn(1)])
    rows, notes = convert(monkeypatch, command)
    assert [row["image"] for row in rows] == [
        f"images_512/{name}" for name, *_ in COVID_EXPECTED if name != "b.jpg"]
    assert sum(notes["funnel"]["images"]["unreadable image"].values()) == 2
    printed = capsys.readouterr()
    assert "b.png" in printed.out + printed.err


def test_covid_sources_that_are_not_it(monkeypatch, tmp_path):
    """Guards: a traceback for a folder that is no clone, or annotations of another form."""
    command = covid_tree(tmp_path)
    boxes = tmp_path / "repo" / "annotations" / "imageannotation_ai_lung_bounding_boxes.json"
    for text in ("[]", '{"images": [], "annotations": [{"bbox": [1]}]}', "{"):
        boxes.write_text(text)
        assert boxes.name in fails(monkeypatch, command)
    assert "No such file" in fails(monkeypatch, command, "--repo", tmp_path)


# ---- the shared steps ----------------------------------------------------------------------------

def test_fusion_has_the_worked_values():
    """Guards: fusion from the first box on, of a box with a member instead of the mean, at an IoU
    that only equals the threshold, across boxes that do not touch; empty boxes kept."""
    fuse = data.weighted_boxes_fusion
    pair = [[0, 0, .4, .4], [.2, 0, .6, .4]]                       # IoU 1/3
    assert np.allclose(fuse(pair, .3), [[.1, 0, .5, .4]]) and fuse(pair, .4) == pair
    assert fuse([[0, 0, .5, 1], [0, 0, 1, 1]], .5) == [[0, 0, .5, 1], [0, 0, 1, 1]]
    assert fuse([[.1, .1, .1, .5], [.2, .3, .4, .3]], .1) == [] == fuse([], .1)
    assert fuse([[.6, 0, .7, .1], [0, 0, .1, .1]], 0) == [[0, 0, .1, .1], [.6, 0, .7, .1]]
    # three steps of .2, IoU 1/3 of neighbours: from the right, the mean of the last two, (.3, .7),
    # overlaps the first, (0, .4), by .1 of .7; from the left it would be the first two
    steps = [[0, 0, .4, 1], [.2, 0, .6, 1], [.4, 0, .8, 1]]
    assert np.allclose(fuse(steps, .3), [[0, 0, .4, 1], [.3, 0, .7, 1]])
    assert np.allclose(fuse(steps, .1), [[.2, 0, .6, 1]])          # means of members, not of means


# ---- bad days ------------------------------------------------------------------------------------

def cut(path, part=0.6):
    raw = path.read_bytes()
    path.write_bytes(raw[:int(len(raw) * part)])


def spoil(path):
    """Change a byte in the middle of a zip's first member."""
    raw = bytearray(path.read_bytes())
    raw[120] ^= 255
    path.write_bytes(raw)


def header_only(path):
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw.replace(b"dicom_id", b"image_id")))


TABLE, VIEWS = "MIMIC-CXR-JPG.csv.gz", "mimic-cxr-jpg/mimic-cxr-2.0.0-metadata.csv.gz"
ZIP, RATED_TABLE = "qba/exports/A_frontal/qa.zip", "metadata/App/question_metadata.csv.gz"
CHAT = "llava-rad/1.0.0/chat_test_MIMIC_CXR_all_gpt4extract_rulebased_v1.json"
BAD = [(TABLE, cut, "download complete"), (VIEWS, cut, "download complete"),
       (ZIP, cut, "download complete"), (ZIP, spoil, "download complete"),
       (CHAT, cut, "download complete"),
       (TABLE, header_only, "dicom_id"), (TABLE, Path.unlink, "No such file"),
       (ZIP, Path.unlink, "--qba expects"), (CHAT, Path.unlink, "--llava-rad expects"),
       (f"qba/exports/A_frontal/{RATED_TABLE}", Path.unlink, "question_metadata")]


@pytest.mark.parametrize("name, harm, words", BAD)
def test_a_damaged_or_missing_source_is_one_line(monkeypatch, mimic, tmp_path, name, harm, words):
    """Guards: a traceback, or a manifest of the half that could be read."""
    harm(tmp_path / name)
    said = fails(monkeypatch, mimic, "--size", 80)
    assert words in said and str(tmp_path) in said


@pytest.mark.parametrize("flag, words", [("--images", "root of MIMIC-CXR-JPG"),
                                         ("--llava-rad", "--llava-rad expects"),
                                         ("--qba", "--qba expects"), ("--chexmask", "directory")])
def test_a_wrong_folder_is_one_line(monkeypatch, mimic, tmp_path, flag, words):
    """Guards: an empty manifest, or hours of images before the mistake is said."""
    (tmp_path / "empty").mkdir()
    said = fails(monkeypatch, mimic, "--size", 80, flag, tmp_path / "empty")
    assert words in said and not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_half_file(monkeypatch, mimic, tmp_path):
    """Guards: a cut image taken for done by the next run, a manifest cut where the space ends."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device without space")
    out = tmp_path / "out"
    monkeypatch.setattr(uuid, "uuid4", lambda: SimpleNamespace(hex="draft"))
    for name in (f"images_80/{PLACE['c2']}", "prepare.json", "manifest.jsonl"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        draft = (out / name).with_name(f".{(out / name).name}.draft.tmp")
        draft.symlink_to("/dev/full")
        said = fails(monkeypatch, mimic, "--size", 80)
        assert "No space left on device" in said and str(out / name) in said
        assert not (out / name).exists()
    assert len(convert(monkeypatch, mimic, "--size", 80)[0]) == len(EXPECTED)


def test_another_set_is_not_written_over(monkeypatch, mimic, tmp_path, phantom):
    """Guards: the phantom's manifest, or another converter's, lost to a wrong --out."""
    other = tmp_path / "ms"
    other.mkdir()
    (other / "manifest.jsonl").write_text("{}")
    (other / "prepare.json").write_text('{"command": "ms-cxr"}')
    for out in (phantom, other):
        before = (out / "manifest.jsonl").read_bytes()
        with pytest.raises(InputError, match="choose another --out"):
            convert(monkeypatch, [*mimic[:-1], out])
        assert (out / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize("flag, value", [("--size", -1), ("--workers", 0), ("--wbf-iou", 1.5)])
def test_flags_that_cannot_be_are_refused(monkeypatch, mimic, flag, value):
    """Guards: a ZeroDivisionError an hour later."""
    assert flag in fails(monkeypatch, mimic, flag, value)


def test_the_command_ends_with_one_line(mimic, tmp_path):
    """Guards: a traceback, or exit code 0, where main() is run as a command."""
    line = run("data.py", *mimic, "--images", tmp_path / "nowhere", ok=False)
    assert line.startswith("data.py: ") and "nowhere" in line
