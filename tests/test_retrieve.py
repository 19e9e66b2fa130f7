"""Retrieval: top-k, cached embeddings, Table 1, and search as a person runs it."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file
from transformers import SiglipModel

import bench
import data
import retrieve
from conftest import ROOT, SMALL, in_two_processes, made_earlier
from data import InputError
from model import DualEncoder, LoFi
from retrieve import top_k


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def save_run(rows, folder, seed=0):
    """A run folder of a random small LoFi with LoRA, without its trainer.pt."""
    torch.manual_seed(seed)
    lofi = LoFi.build(SMALL, data.tokenizer_texts(rows))
    for name, p in lofi.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    lofi.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(rows, tmp_path_factory):
    return save_run(rows, tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def siglip(checkpoint, tmp_path_factory):
    """The encoders of the run as a SiglipModel folder, LoRA merged by peft."""
    folder, lofi = tmp_path_factory.mktemp("siglip"), LoFi.from_pretrained(checkpoint)
    lofi.siglip.merge_and_unload().save_pretrained(folder)
    lofi.text_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(checkpoint, tmp_path):
    """The encoder of a copy of the run, so that each test has a cache of its own."""
    return DualEncoder.load(shutil.copytree(checkpoint, tmp_path / "run"))


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """retrieve.main() with these flags, in an empty folder -> what it prints."""
    def call(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["retrieve.py", *map(str, flags)])
        capsys.readouterr()
        retrieve.main()
        return capsys.readouterr().out
    return call


# ---- top-k --------------------------------------------------------------------------------------

def test_top_k_is_the_sorted_list():
    """Guards: a neighbour lost between chunks, similarities of another order than the indices, a
    result that depends on how many queries are taken at a time."""
    torch.manual_seed(0)
    for pool in (unit(400, 24), unit(30, 24)[torch.randint(0, 30, (400,))], unit(1, 24)):
        queries = torch.cat([unit(5, 24), pool[:2]])
        cosine = queries @ pool.T
        for k in sorted({1, min(7, len(pool)), len(pool)}):
            best = torch.tensor([sorted(row, reverse=True)[:k] for row in cosine.tolist()])
            for chunk in (1, 1000, 2 ** 20):
                similarity, index = top_k(queries, pool, k, chunk=chunk)
                assert torch.allclose(similarity, best, atol=1e-6)
                assert torch.allclose(cosine.gather(1, index), best, atol=1e-6)
                assert all(len(set(row)) == k for row in index.tolist())


def test_top_k_holds_no_more_than_a_chunk(monkeypatch):
    """Guards: all similarities of a large set in memory at once."""
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *x, **out: seen.append(mm(*x, **out)) or seen[-1])
    top_k(unit(50, 8), unit(100, 8), 3, chunk=1000)
    assert [tuple(x.shape) for x in seen] == [(10, 100)] * 5
    assert len({x.data_ptr() for x in seen}) == 1


@pytest.mark.parametrize("k", [0, -1, 10])
def test_top_k_refuses_a_k_that_the_pool_cannot_give(k):
    """Guards: fewer neighbours than asked for, or torch's own error."""
    with pytest.raises(InputError, match=f"k is {k}, expected 1 to 9"):
        top_k(unit(2, 4), unit(9, 4), k)


# ---- encoders -----------------------------------------------------------------------------------

def test_a_run_and_the_siglip_of_its_weights_are_one_encoder(encoder, siglip, rows):
    """Guards: a second forward path for baselines; LoRA left out of a run; other normalisation."""
    plain = DualEncoder.load(siglip)
    paths, texts = [row["path"] for row in rows[:5]], [row["report"] for row in rows[:5]]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p).resize((32, 32), 2), np.float32))
                          for p in paths])[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    with torch.no_grad():
        expected = F.normalize(SiglipModel.from_pretrained(siglip).eval().get_image_features(
            pixel_values=pixels).pooler_output, dim=1)
        a, b = encoder.encode_image(paths), plain.encode_image(paths)
        assert torch.allclose(encoder.encode_text(texts), plain.encode_text(texts), atol=1e-6)
    assert torch.allclose(a, b, atol=1e-6) and torch.allclose(b, expected, atol=1e-6)
    assert (plain.image_size, plain.text_length) == (32, 32)
    assert plain.source == siglip and not isinstance(plain, LoFi)


def breakages(folder):
    """(what to do to a SiglipModel folder, words of the error)"""
    weights, config = folder / "model.safetensors", folder / "config.json"
    yield lambda: (folder / "tokenizer_config.json").write_text("{"), "tokenizer"
    whole = weights.read_bytes()
    part = {k: v for k, v in load_file(weights).items() if "post_layernorm" not in k}
    yield lambda: (folder / "tokenizer_config.json").unlink() or save_file(
        part, weights, {"format": "pt"}), "2 weights of a SiglipModel are missing"
    yield lambda: weights.write_bytes(whole[:5000]), "cannot be loaded"
    yield weights.unlink, "no file named model.safetensors"
    yield config.unlink, "cannot be loaded"


def test_what_is_no_encoder_gets_one_line(encoder, siglip, tmp_path):
    """Guards: a traceback; weights that are missing and stay random; a lost run looked for on the
    hub."""
    folder = shutil.copytree(siglip, tmp_path / "siglip")
    for break_it, words in breakages(folder):
        break_it()
        with pytest.raises(InputError, match=words) as error:
            DualEncoder.load(folder)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="nothing: cannot be loaded .*expected a folder"):
        DualEncoder.load(tmp_path / "nothing")                 # not sought on the hub
    weights = Path(encoder.source) / "model.safetensors"
    weights.write_bytes(b"half")
    with pytest.raises(InputError, match="run: config.json or model.safetensors is") as error:
        DualEncoder.load(encoder.source)
    assert "\n" not in str(error.value)


# ---- embeddings and their cache -----------------------------------------------------------------

def count_images(monkeypatch):
    """How many images an encoder sees from here on -> a list that grows."""
    seen, encode = [], DualEncoder.encode_image
    monkeypatch.setattr(DualEncoder, "encode_image", lambda self, images, *rest: (
        seen.append(len(images)) or encode(self, images, *rest)))
    return seen


def test_images_are_embedded_once(encoder, phantom, rows, monkeypatch):
    """Guards: rows in another order than asked for; an image embedded twice; a second encoder of
    the same checkpoint that does not find the embeddings of the first."""
    expected = torch.cat([encoder.encode_image(row["path"]) for row in rows])
    seen = count_images(monkeypatch)
    emb = retrieve.image_embeddings(encoder, phantom, rows, batch_size=7)
    assert torch.allclose(emb, expected, atol=1e-6) and sum(seen) == 40
    again = retrieve.image_embeddings(DualEncoder.load(encoder.source), phantom / "manifest.jsonl",
                                      rows)
    assert torch.equal(again, emb) and sum(seen) == 40 and again.dtype == torch.float32
    for some in (rows[20:5:-1], rows[:9], rows[::-1]):         # of other rows, never those of all
        few = retrieve.image_embeddings(encoder, phantom, some)
        assert torch.allclose(few, expected[[rows.index(row) for row in some]], atol=1e-6)


def test_embeddings_follow_the_images_and_the_weights(encoder, phantom, tmp_path, monkeypatch):
    """Guards: neighbours by an image that was replaced, though by one of as many bytes, or by the
    weights of an earlier checkpoint in the same folder."""
    folder, run_dir = shutil.copytree(phantom, tmp_path / "images"), encoder.source
    rows = data.read_manifest(folder, "train")
    one, other = (Path(rows[i]["path"]) for i in (3, 5))
    n = max(path.stat().st_size for path in (one, other))
    for path in (one, other):                                  # zeros after its end change no PNG
        path.write_bytes(path.read_bytes().ljust(n, b"\0"))
    made_earlier(folder, 60)
    made_earlier(run_dir, 60)
    good, seen = retrieve.image_embeddings(encoder, folder, rows), count_images(monkeypatch)
    assert torch.equal(retrieve.image_embeddings(encoder, folder, rows), good) and not seen

    made_earlier(Path(run_dir, "embeddings"), 30)
    encoder = DualEncoder.load(save_run(rows, run_dir, seed=1))    # trained again
    expected = torch.cat([encoder.encode_image(row["path"]) for row in rows])
    assert torch.allclose(retrieve.image_embeddings(encoder, folder, rows), expected, atol=1e-6)
    assert not torch.allclose(expected, good, atol=1e-2)

    made_earlier(run_dir, 60)
    made_earlier(Path(run_dir, "embeddings"), 30)
    other.write_bytes(one.read_bytes())
    emb = retrieve.image_embeddings(encoder, folder, rows)
    assert not torch.allclose(expected[5], expected[3], atol=1e-3)
    assert torch.allclose(emb[5], expected[3], atol=1e-6)


def test_a_torn_cache_is_not_read(encoder, phantom, rows):
    """Guards: embeddings out of half a file; it is made anew, or named by an error."""
    good = retrieve.image_embeddings(encoder, phantom, rows)
    [file] = Path(encoder.source, "embeddings").iterdir()
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"no tensors"):
        file.write_bytes(content)
        try:
            assert torch.equal(retrieve.image_embeddings(encoder, phantom, rows), good)
        except InputError as error:
            assert file.name in str(error)


def test_embeddings_without_a_place_to_keep_them(encoder, siglip, phantom, rows, tmp_path,
                                                 monkeypatch):
    """Guards: a traceback where the cache cannot be written; the cache of a hub's model put in a
    folder of its name, or read for another model of the hub."""
    monkeypatch.chdir(tmp_path)
    other = DualEncoder.load(siglip)
    with torch.no_grad():
        next(other.siglip.vision_model.parameters()).mul_(2)
    encoder.source, other.source = "google/siglip2", "google/medsiglip"
    a, b = (retrieve.image_embeddings(each, phantom, rows[:4]) for each in (encoder, other))
    assert not torch.allclose(a, b, atol=1e-3) and not Path("google").exists()
    assert torch.equal(retrieve.image_embeddings(encoder, phantom, rows[:4]), a)
    assert len(list(Path("runs").rglob("*.safetensors"))) == 2
    shutil.rmtree("runs")
    Path("runs").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="Not a directory: 'runs/google_siglip2"):
        retrieve.image_embeddings(encoder, phantom, rows[:4])


def test_long_texts_are_cut_and_said(encoder, capsys):
    """Guards: a text cut in silence; equal texts with embeddings that differ."""
    texts = ["No nodule.", "No nodule. " * 40, "No nodule."]
    emb = retrieve.text_embeddings(encoder, texts, batch_size=1)
    assert "truncated 1 of 3 texts to the text encoder's 32 tokens" in capsys.readouterr().out
    assert torch.equal(emb[0], emb[2]) and emb.shape == (3, 32)
    with torch.no_grad():
        assert torch.allclose(emb, encoder.encode_text(texts), atol=1e-6)
    retrieve.text_embeddings(encoder, texts[:1])
    assert not capsys.readouterr().out


# ---- Table 1, chance and neighbours -------------------------------------------------------------

@pytest.fixture
def studies(rows):
    """12 rows: two images of a study, one of another patient's study of that name, reports of 1 to
    3 sub-reports, one without a report."""
    words = 4 * [s for row in rows for s in data.split_sentences(row["report"])]
    few = [{**row, "report": " ".join(words[13 * i:13 * i + 1 + i])}
           for i, row in enumerate(rows[:12])]
    few[4] = {**few[4], "study": few[3]["study"], "patient": few[3]["patient"]}
    few[5] = {**few[5], "study": few[3]["study"]}              # of another patient
    few[6] = {**few[6], "report": ""}
    return few


def test_table_1_by_double_loops(encoder, studies):
    """Guards: sub-reports that belong to another image, a study that counts twice, an image without
    a report among the candidates, R@K of the wrong direction."""
    with torch.no_grad():
        emb = torch.cat([encoder.encode_image(row["path"]) for row in studies])
    table = data.sub_report_table(studies)
    result = retrieve.table_1(encoder, table, emb)
    images = [i for i in range(12) if i not in (4, 6)]
    texts = [(i, text) for i in images for text in data.sub_reports(studies[i]["report"])]
    assert table[0] == images and table[1] == [text for _, text in texts]
    assert max(np.bincount([i for i, _ in texts])) == 3
    with torch.no_grad():
        cosine = (emb @ encoder.encode_text([text for _, text in texts]).T).double().numpy()
    for k in (1, 5, 10):
        hits = [any(texts[j][0] == i for j in sorted(range(len(texts)),
                                                     key=lambda j: -cosine[i, j])[:k])
                for i in images]
        assert result["i2t"][f"R@{k}"] == pytest.approx(np.mean(hits))
        hits = [i in sorted(images, key=lambda f: -cosine[f, j])[:k]
                for j, (i, _) in enumerate(texts)]
        assert result["t2i"][f"R@{k}"] == pytest.approx(np.mean(hits))
    assert data.sub_report_table([{**row, "report": ""} for row in studies])[1] == []


def test_the_row_chance(studies, capsys):
    """Guards: chance of one direction printed for the other; a row for the wrong model."""
    table = data.sub_report_table(studies)
    images, texts, owner = table
    chance = retrieve.chance(table)
    n_own = np.bincount(owner)
    assert chance["i2t"]["R@1"] == pytest.approx(np.mean(n_own) / len(texts))
    assert chance["t2i"]["R@5"] == pytest.approx(5 / len(images)) and chance["t2i"]["R@40"] == 1
    perfect = {way: dict.fromkeys(chance[way], 1.0) for way in chance}
    print(retrieve.format_table_1({"LoFi": perfect}, chance))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert [line[0] for line in lines] == ["Image-to-Text", "LoFi", "chance",
                                           "Text-to-Image", "LoFi", "chance"]
    assert lines[1][1:] == ["100.00"] * 5
    assert lines[5][1:] == [f"{100 * value:.2f}" for value in chance["t2i"].values()]


def test_shared_findings_by_loops(rows):
    """Guards: size taken for a finding, the query's own patient among its neighbours, a chance that
    counts the query itself."""
    assert bench.findings({"regions": [
        {"phrase": "Small left  pleural effusion.", "boxes": [[0, 0, 1, 1]]},
        {"phrase": "The heart is moderately enlarged.", "boxes": [[0, 0, 1, 1]]},
        {"phrase": "No nodule.", "boxes": []}]}) == {"left pleural effusion.",
                                                     "the heart is enlarged."}
    rows = [{**row, "patient": f"p{i // 3}"} for i, row in enumerate(rows)]
    rows[8] = {**rows[8], "regions": []}
    torch.manual_seed(0)
    emb, near, chance = unit(len(rows), 8), [], []
    found = [bench.findings(row) for row in rows]
    for i in (i for i in range(len(rows)) if found[i]):
        others = [j for j in range(len(rows)) if j // 3 != i // 3]
        shares = {j: bool(found[i] & found[j]) for j in others}
        others.sort(key=lambda j: -float(emb[i] @ emb[j]))
        near.append(np.mean([shares[j] for j in others[:5]]))
        chance.append(np.mean(list(shares.values())))
    result = bench.shared_findings(rows, emb)
    assert result == {"shared@5": pytest.approx(np.mean(near)),
                      "chance": pytest.approx(np.mean(chance)), "n_queries": len(near)}
    assert len(near) == 39 and 0 < result["chance"] < 1


# ---- as a person runs it ------------------------------------------------------------------------

def test_table_1_for_several_checkpoints(encoder, siglip, phantom, tmp_path, call):
    """Guards: a row that is missing or twice the same; keys of --json that are not the design's;
    rows of another split."""
    flags = ("--data", phantom, "--device", "cpu", "--json", tmp_path / "t.json")
    text = call("--checkpoint", encoder.source, *flags)
    one = json.loads((tmp_path / "t.json").read_text())
    assert {"i2t", "t2i", "n_images", "seconds"} == set(one) and one["n_images"] == 12
    assert list(one["i2t"]) == list(one["t2i"]) == ["R@1", "R@5", "R@10", "R@20", "R@40"]
    for words in ("Image-to-Text", "Text-to-Image", "R@40", "chance", "Next: python"):
        assert words in text
    test_rows = data.read_manifest(phantom, "test")
    with torch.no_grad():
        emb = torch.cat([encoder.encode_image(row["path"]) for row in test_rows])
    table = data.sub_report_table(test_rows)
    for way, values in retrieve.table_1(encoder, table, emb).items():
        assert one[way] == pytest.approx(values)
    text = call("--checkpoint", encoder.source, siglip, *flags)
    both = json.loads((tmp_path / "t.json").read_text())
    assert list(both) == [encoder.source, str(siglip)]
    assert all(both[source]["t2i"] == one["t2i"] for source in both)
    assert sum(line.startswith((encoder.source, str(siglip))) for line in text.splitlines()) == 4


def test_two_searches_embed_once_and_a_changed_manifest_or_image_anew(encoder, phantom, tmp_path,
                                                                      call, monkeypatch):
    """Guards: the images of a pool embedded again by every search; and neighbours by an earlier
    manifest, image or checkpoint. By how many images the encoder sees."""
    folder = shutil.copytree(phantom, tmp_path / "set")
    image, other = (folder / row["image"] for row in data.read_manifest(folder, "test")[:2])
    made_earlier(tmp_path, 60)
    flags = ("--checkpoint", encoder.source, "--data", folder, "--text", "Nodule.", "--json",
             "s.json")
    seen, run_dir = count_images(monkeypatch), Path(encoder.source)
    for changed, expected in ((None, 12), (None, 0), (folder / "manifest.jsonl", 12), (None, 0),
                              (run_dir / "model.safetensors", 12), (None, 0), (image, 12)):
        if changed:
            made_earlier(tmp_path, 30)
            changed.write_bytes((other if changed == image else changed).read_bytes())
        seen.clear()
        call(*flags, "--k", 12 if changed == image else 1)
        assert sum(seen) == expected, changed
    found = {row["image"]: row["similarity"]
             for row in json.loads(Path("s.json").read_text())["results"]}
    a, b = (found[str(path.relative_to(folder))] for path in (image, other))
    assert a == pytest.approx(b, abs=1e-5)


def test_categories_by_hand(encoder, phantom, tmp_path, call):
    """Guards: AUROC of another difference than "X." minus "No X.", P@K of another order or with
    rows that have no labels, labels that miss by their capitals, a finding of no or every image
    that ends the run. AUROC by a double loop over pairs."""
    folder = shutil.copytree(phantom, tmp_path / "set")
    lines = [json.loads(line) for line in open(folder / "manifest.jsonl")]
    test = [row for row in lines if row["split"] == "test"]
    for n, row in enumerate(test):
        row["labels"] = ["Pleural Effusion"] * (n % 3 == 0) + ["nodule"] * (n < 7) + ["x-ray"]
    del test[5]["labels"]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    out = call("--checkpoint", encoder.source, "--data", folder, "--json", "c.json", "--categories",
               "pleural effusion", "Nodule.", "x-ray", "mass")
    scores = json.loads(Path("c.json").read_text())["categories"]
    labelled = [row for row in test if "labels" in row]
    images = [encoder.encode_image(folder / row["image"])[0].double().numpy() for row in labelled]
    for name, words in (("pleural effusion", "pleural effusion"), ("Nodule.", "nodule")):
        there, gone = (encoder.encode_text(text)[0].double().numpy()
                       for text in (f"{words}.", f"no {words}."))
        shows = [words in [label.lower() for label in row["labels"]] for row in labelled]
        value = [float(image @ there - image @ gone) for image in images]
        pairs = [value[i] > value[j] for i in range(11) for j in range(11)
                 if shows[i] and not shows[j]]
        assert scores[name]["AUROC"] == pytest.approx(np.mean(pairs))
        order = sorted(range(11), key=lambda i: -float(images[i] @ there))
        for k in (1, 2, 5, 10):
            assert scores[name][f"P@{k}"] == pytest.approx(np.mean([shows[i] for i in order[:k]]))
        assert scores[name]["n_images"] == sum(shows)
        cells = [f"{100 * scores[name][key]:.2f}" for key in ("AUROC", "P@1", "P@2", "P@5", "P@10")]
        [line] = [line for line in out.splitlines() if line.startswith(name)]
        assert line[len(name):].split() == [str(sum(shows)), *cells]
    assert scores["x-ray"] == {"n_images": 11, "AUROC": None, "P@1": 1, "P@2": 1, "P@5": 1,
                               "P@10": 1}
    assert scores["mass"]["n_images"] == 0 == scores["mass"]["P@10"]
    for row in test:
        row.pop("labels", None)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(InputError, match="no row of split 'test' has 'labels'"):
        call("--checkpoint", encoder.source, "--data", folder, "--categories", "nodule")


def test_search_by_image(encoder, phantom, tmp_path, call):
    """Guards: the query among its own neighbours, also under the name of a link; neighbours that
    are not the nearest; a contact sheet without the query first or without boxes."""
    rows = data.read_manifest(phantom, "test")
    png, out, link = tmp_path / "new" / "sheet.png", tmp_path / "s.json", tmp_path / "link.png"
    link.symlink_to(rows[2]["path"])
    text = call("--checkpoint", encoder.source, "--data", phantom, "--k", 4,
                "--image", link, "--png", png, "--json", out, "--device", "cpu")
    found = json.loads(out.read_text())["results"]
    with torch.no_grad():
        emb = torch.cat([encoder.encode_image(row["path"]) for row in rows])
    cosine = (emb @ emb[2]).tolist()
    order = sorted((i for i in range(12) if i != 2), key=lambda i: -cosine[i])[:4]
    assert [row["study"] for row in found] == [rows[i]["study"] for i in order]
    assert [row["similarity"] for row in found] == pytest.approx([cosine[i] for i in order],
                                                                 abs=1e-5)
    assert "left out" in text and f"{found[0]['similarity']:.4f}" in text
    assert all(row["report"][:40] in text for row in found)
    assert f"icl_ground.py --checkpoint {encoder.source} --data {phantom} --image {link}" in text
    sheet = np.array(Image.open(png))
    assert sheet.shape == (2 * 448, 3 * 360, 3)                # 5 cells
    assert sheet[1, 1].tolist() == [255, 165, 0] and sheet[1, 361].tolist() == [0, 0, 0]
    for n, row in enumerate([rows[2]] + found):
        cell = sheet[n // 3 * 448:][:360, n % 3 * 360:][:, :360]
        drawn = sum((cell == ImageColor.getrgb(c)).all(-1) for c in data.COLOURS).astype(bool)
        for region in row["regions"]:
            x0, y0, x1, y1 = [4 + round(v * 351) for v in region["boxes"][0]]
            for x in (x0, x1):
                assert drawn[y0:y1, x - 1:x + 2].any(1).all(), row["image"]
            for y in (y0, y1):
                assert drawn[y - 1:y + 2, x0:x1].any(0).all(), row["image"]


def test_search_by_text(encoder, phantom, tmp_path, call):
    """Guards: a text compared with texts; a long one cut in silence; a split that is ignored; a
    contact sheet with an empty cell for the text, or without one of the images."""
    words = "Large left pleural effusion. " * 12
    text = call("--checkpoint", encoder.source, "--data", phantom, "--text",
                words, "--split", "all", "--k", 20, "--json", "s.json", "--device", "cpu")
    found = json.loads(Path("s.json").read_text())["results"]
    rows = data.read_manifest(phantom)
    with torch.no_grad():
        text_emb = encoder.encode_text([words])[0]
        cosine = encoder.encode_image([row["path"] for row in rows]) @ text_emb
    values = dict(zip([row["image"] for row in rows], cosine.tolist()))
    assert len(found) == 20 and {row["split"] for row in found} >= {"train", "test"}
    assert [row["similarity"] for row in found] == pytest.approx(
        sorted(values.values(), reverse=True)[:20], abs=1e-5)
    assert all(row["similarity"] == pytest.approx(values[row["image"]], abs=1e-5) for row in found)
    assert "to the text encoder's 32 tokens" in text
    sheet = np.array(Image.open("runs/retrieve.png"))          # 20 cells of black frames
    assert sheet.shape == (4 * 448, 5 * 360, 3) and not sheet[::448, 360:].any()


def test_a_small_pool_gives_what_it_has(encoder, phantom, call):
    """Guards: the default --k refused on a pool of two images; a given --k lowered in silence."""
    flags = ("--checkpoint", encoder.source, "--data", phantom, "--split", "val", "--text", "Mass.",
             "--json", "s.json")
    call(*flags)
    assert len(json.loads(Path("s.json").read_text())["results"]) == 2
    with pytest.raises(InputError, match="k is 3, expected 1 to 2"):
        call(*flags, "--k", 3)


def test_data_come_from_the_training_of_the_checkpoint(encoder, phantom, tmp_path, monkeypatch):
    """Guards: a run searched on the phantom, with exit code 0, that was trained on something else
    or whose trainer.pt is missing or damaged; a traceback for such a file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="runs/phantom_data, its data, .*give --data"):
        retrieve.trained_on("google/siglip2-base-patch16-224")
    shutil.copytree(phantom, "runs/phantom_data")
    assert retrieve.trained_on("google/siglip2-base-patch16-224") == "runs/phantom_data"
    trainer = Path(encoder.source) / "trainer.pt"
    torch.save({"settings": {"data": str(phantom)}}, trainer)
    whole = trainer.read_bytes()
    for content in (None, whole[:len(whole) // 2], b"", b"no checkpoint"):
        trainer.unlink()
        if content is not None:
            trainer.write_bytes(content)
        with pytest.raises(InputError, match="trainer.pt.* missing or damaged; give --data"):
            retrieve.trained_on(encoder.source)
        trainer.touch()
    for state in ({"step": 1}, {"settings": {}}):
        torch.save(state, trainer)
        with pytest.raises(InputError, match="trainer.pt.* missing or damaged; give --data"):
            retrieve.trained_on(encoder.source)
    for own, expected in ((str(phantom), str(phantom)),
                          ("/moved/phantom_data", "runs/phantom_data")):
        torch.save({"settings": {"data": own}}, trainer)
        assert retrieve.trained_on(encoder.source) == expected
    torch.save({"settings": {"data": "/elsewhere/mimic"}}, trainer)
    with pytest.raises(InputError, match="/elsewhere/mimic, its data, .*give --data"):
        retrieve.trained_on(encoder.source)


@pytest.mark.parametrize("flags, words", [
    (("--checkpoint", "runs/phantom"), "no such checkpoint"),
    (("--checkpoint", "test only"), "cannot be loaded"),
    (("--image", __file__), "cannot be read as an image"), (("--k", 13, "--text", "x"), "1 to 12"),
    (("--data", "nowhere"), "no such file"), (("--device", "tpu9"), "tpu9"),
    (("--split", "val", "--data", "test only"), "pool is empty"),
    (("--image", "x.png", "--png", "x.png"), "x.png"),
    (("--png", "mine.txt", "--text", "x"), "expected a .png"), (("--json", "m.png"), "a .json"),
    (("--text", " "), "--text is empty"), (("--batch-size", "0"), "1 or more"),
    (("--k", "0"), "1 or more"), (("--categories", "nodule", "--text", "x"), "not allowed with"),
    (("--wrong",), "--wrong"), (("--checkpoint", "a", "b", "--text", "x"), "one for a search")])
def test_wrong_input_gets_one_line(checkpoint, phantom, tmp_path, call, capsys, flags, words):
    """Guards: a traceback, a flag that is ignored, a query image replaced by a picture, a file half
    written."""
    (tmp_path / "test only").mkdir()
    rows = [line for line in open(phantom / "manifest.jsonl") if '"test"' in line]
    (tmp_path / "test only" / "manifest.jsonl").write_text("".join(rows))
    (tmp_path / "test only" / "images").symlink_to(phantom / "images")
    shutil.copy(next((phantom / "images").glob("*.png")), tmp_path / "x.png")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises((InputError, SystemExit)) as error:
        call("--checkpoint", checkpoint, "--data", phantom, *flags)
    is_usage = isinstance(error.value, SystemExit)             # argparse's, on stderr
    line = capsys.readouterr().err.splitlines()[-1] if is_usage else str(error.value)
    assert words in line and "\n" not in line
    assert before == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}


def test_an_error_is_one_line_and_an_exit_code(tmp_path, monkeypatch):
    """Guards: a traceback where a person forgot to train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "retrieve.py")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "retrieve.py"), run_name="__main__")
    assert end.value.code.startswith("retrieve.py: runs/phantom: no such checkpoint; python train")
    assert "\n" not in end.value.code


def test_two_processes_embed_as_one_does(encoder, phantom, tmp_path):
    """Guards: images of a process lost or out of order, a result written twice, processes that wait
    for each other for ever."""
    printed = in_two_processes(retrieve.main, tmp_path, "--checkpoint", encoder.source, "--data",
                               phantom, "--split", "all", "--batch-size", 8, "--device", "cpu",
                               "--json", "t.json")
    assert printed[0].count("Image-to-Text") == 1 and "Next:" in printed[0] and not printed[1]
    assert json.loads((tmp_path / "t.json").read_text())["n_images"] == 54
    rows = data.read_manifest(phantom)
    encode, encoder.encode_image = encoder.encode_image, lambda *_: pytest.fail("not cached")
    emb = retrieve.image_embeddings(encoder, phantom, rows)
    assert torch.allclose(emb, torch.cat([encode(row["path"]) for row in rows]), atol=1e-6)
