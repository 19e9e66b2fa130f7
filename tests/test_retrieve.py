"""Retrieval: top-k, cached embeddings, Table 1, and search as a person runs it."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from transformers import SiglipModel

import bench
import data
import model as lofi_model
import retrieve
from conftest import ROOT, SMALL, run
from metrics import InputError
from model import Encoder, LoFi
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


@pytest.fixture
def encoder(checkpoint, tmp_path):
    """The encoder of a copy of the run, so that each test has a cache of its own."""
    return Encoder.load(shutil.copytree(checkpoint, tmp_path / "run", ignore=lambda *_: [
        "embeddings"]))


def call(monkeypatch, capsys, *flags):
    """retrieve.main() with these flags -> what it prints."""
    monkeypatch.setattr(sys, "argv", ["retrieve.py", *map(str, flags)])
    capsys.readouterr()
    retrieve.main()
    return capsys.readouterr().out


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

def test_a_run_and_its_export_are_one_encoder(encoder, rows, tmp_path):
    """Guards: a second forward path for baselines; LoRA left out of a run; other normalisation."""
    lofi_model.export(encoder.source, tmp_path / "siglip")
    plain = Encoder.load(tmp_path / "siglip")
    paths, texts = [row["path"] for row in rows[:5]], [row["report"] for row in rows[:5]]
    siglip = SiglipModel.from_pretrained(tmp_path / "siglip").eval()
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p).resize((32, 32), 2), np.float32))
                          for p in paths])[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    with torch.no_grad():
        expected = F.normalize(siglip.get_image_features(pixel_values=pixels).pooler_output, dim=1)
        a, b = encoder.encode_image(paths), plain.encode_image(paths)
        assert torch.allclose(encoder.encode_text(texts), plain.encode_text(texts), atol=1e-6)
    assert torch.allclose(a, b, atol=1e-6) and torch.allclose(b, expected, atol=1e-6)
    assert (plain.image_size, plain.text_length) == (32, 32)
    assert plain.source == str(tmp_path / "siglip") and not isinstance(plain, LoFi)


def breakages(folder):
    """(what to do to an exported folder, words of the error)"""
    weights, config = folder / "model.safetensors", folder / "config.json"
    yield lambda: (folder / "tokenizer_config.json").write_text("{"), "tokenizer"
    yield lambda: weights.write_bytes(weights.read_bytes()[:5000]), "cannot be loaded"
    yield weights.unlink, "no file named model.safetensors"
    yield lambda: config.write_text('{"model_type": "gemma3_text"}'), "is a gemma3_text model"
    yield config.unlink, "no such checkpoint"


def test_what_is_no_encoder_gets_one_line(encoder, tmp_path):
    """Guards: a traceback; a model of another kind loaded with random weights; a lost run looked
    for on the hub."""
    lofi_model.export(encoder.source, tmp_path / "siglip")
    for break_it, words in breakages(tmp_path / "siglip"):
        break_it()
        with pytest.raises(InputError, match=words) as error:
            Encoder.load(tmp_path / "siglip")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such checkpoint"):
        Encoder.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="hf auth login"):
        Encoder.load("google/medsiglip-448")
    (Path(encoder.source) / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="damaged"):
        Encoder.load(encoder.source)


# ---- embeddings and their cache -----------------------------------------------------------------

def cached(encoder):
    return sorted((Path(encoder.source) / "embeddings").iterdir())


def count_images(monkeypatch):
    """How many images an encoder sees from here on -> a list that grows."""
    seen, encode = [], Encoder.encode_image
    monkeypatch.setattr(Encoder, "encode_image", lambda self, images, *rest: (
        seen.append(len(images)) or encode(self, images, *rest)))
    return seen


def test_images_are_embedded_once(encoder, phantom, rows, monkeypatch):
    """Guards: rows in another order than asked for; an image embedded twice; a second encoder of
    the same checkpoint that does not find the embeddings of the first."""
    expected = torch.cat([encoder.encode_image(row["path"]) for row in rows])
    seen = count_images(monkeypatch)
    emb = retrieve.image_embeddings(encoder, phantom, rows[20:5:-1], batch_size=7)
    assert torch.allclose(emb, expected[range(20, 5, -1)], atol=1e-6) and sum(seen) == 15
    emb = retrieve.image_embeddings(encoder, phantom / "manifest.jsonl", rows)
    assert torch.allclose(emb, expected, atol=1e-6) and sum(seen) == 55
    again = retrieve.image_embeddings(Encoder.load(encoder.source), phantom, rows)
    assert torch.equal(again, emb) and sum(seen) == 55 and again.dtype == torch.float32
    with pytest.raises(InputError, match="empty"):
        retrieve.image_embeddings(encoder, phantom, [])


def test_a_damaged_cache_is_embedded_anew(encoder, phantom, rows, monkeypatch, capsys):
    """Guards: a truncated, altered or foreign file that is used, or that ends the run; the reason
    kept quiet; a draft left behind."""
    good = retrieve.image_embeddings(encoder, phantom, rows)
    [file], seen = cached(encoder), count_images(monkeypatch)
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[whole.index(good[7].numpy().tobytes()) + 2] ^= 1
    foreign = (Path(encoder.source) / "model.safetensors").read_bytes()
    for content in (whole[:len(whole) // 2], bytes(altered), b"", b"no tensors", foreign):
        file.write_bytes(content)
        seen.clear()
        capsys.readouterr()
        assert torch.equal(retrieve.image_embeddings(encoder, phantom, rows), good)
        assert sum(seen) == 40 and capsys.readouterr().out.count("damaged, embedding") == 1
    assert cached(encoder) == [file] and len(file.read_bytes()) == len(whole)


def test_embeddings_follow_all_that_they_depend_on(encoder, phantom, tmp_path, monkeypatch):
    """Guards: neighbours by the weights of an earlier checkpoint, by an image that was replaced,
    by another image size or by images of another split."""
    folder = shutil.copytree(phantom, tmp_path / "images")
    rows = data.read_manifest(folder, "train")
    good, seen = retrieve.image_embeddings(encoder, folder, rows), count_images(monkeypatch)
    names = {retrieve.cache_file(encoder, folder, some) for some in (rows, rows[:9], rows[::-1])}
    assert len(names) == 3 and not seen
    shutil.copy(rows[3]["path"], rows[5]["path"])
    emb = retrieve.image_embeddings(encoder, folder, rows)
    assert sum(seen) == 40 and torch.allclose(emb[5], good[3], atol=1e-6)
    with torch.no_grad():
        next(p for name, p in encoder.siglip.named_parameters()
             if "vision_model" in name and "lora_B" in name).add_(0.1)
    other = retrieve.image_embeddings(encoder, folder, rows)
    assert sum(seen) == 80 and not torch.allclose(other, emb, atol=1e-3)
    before = retrieve.cache_file(encoder, folder, rows)
    encoder.image_size += 1
    assert retrieve.cache_file(encoder, folder, rows) != before


def test_embeddings_without_a_place_to_keep_them(encoder, phantom, rows, tmp_path, monkeypatch,
                                                 capsys):
    """Guards: a finished embedding lost because its cache cannot be written; the cache of a hub's
    model put in a folder of its name."""
    monkeypatch.chdir(tmp_path)
    encoder.source = "google/siglip2"
    retrieve.image_embeddings(encoder, phantom, rows[:4])
    [file] = (tmp_path / "runs" / "embeddings").iterdir()
    assert file.name.startswith("phantom-") and file.suffix == ".safetensors"
    shutil.rmtree("runs")
    Path("runs").write_text("a file where the folder should be")
    assert len(retrieve.image_embeddings(encoder, phantom, rows[:4])) == 4
    assert "not cached" in capsys.readouterr().out


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
    """12 rows: two images of a study, reports of 1 to 3 sub-reports, one without a report."""
    words = 4 * [s for row in rows for s in data.split_sentences(row["report"])]
    few = [{**row, "report": " ".join(words[13 * i:13 * i + 1 + i])}
           for i, row in enumerate(rows[:12])]
    few[4] = {**few[4], "study": few[3]["study"]}
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

def test_table_1_for_several_checkpoints(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: a row that is missing or twice the same; keys of --json that are not the design's."""
    lofi_model.export(encoder.source, tmp_path / "siglip")
    flags = ("--data", phantom, "--device", "cpu", "--json", tmp_path / "t.json")
    text = call(monkeypatch, capsys, "--checkpoint", encoder.source, *flags)
    one = json.loads((tmp_path / "t.json").read_text())
    assert {"i2t", "t2i", "n_images", "seconds"} == set(one) and one["n_images"] == 12
    assert list(one["i2t"]) == list(one["t2i"]) == ["R@1", "R@5", "R@10", "R@20", "R@40"]
    for words in ("Image-to-Text", "Text-to-Image", "R@40", "chance", "Next: python"):
        assert words in text
    text = call(monkeypatch, capsys, "--checkpoint", encoder.source, tmp_path / "siglip", *flags)
    both = json.loads((tmp_path / "t.json").read_text())
    assert list(both) == [encoder.source, str(tmp_path / "siglip")]
    assert all(both[source]["t2i"] == one["t2i"] for source in both)
    assert sum(line.startswith((encoder.source, str(tmp_path / "siglip")))
               for line in text.splitlines()) == 4


@pytest.mark.parametrize("sentence, category, expected", [
    ("Two small nodules.", "Nodule.", True), ("No nodule.", "nodule", False),
    ("Massive left pleural effusion.", "mass", False),
    ("Masses in both lungs.", "mass", True), ("Left pleural effusion.", "pleural effusion", True)])
def test_a_category_is_named_by_whole_words(sentence, category, expected):
    """Guards: "massive" counted as a mass; a sentence that denies the finding."""
    assert retrieve.mentions(sentence, category) == expected


def test_categories_by_hand(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: "No nodule." read as a nodule; a score with its sign turned; a table of another
    split; an image's heat map scored with another image's boxes; a picture without heat or
    boxes."""
    out = call(monkeypatch, capsys, "--checkpoint", encoder.source, "--data", phantom, "--split",
               "train", "--categories", "Nodule", "unicorn", "--json", tmp_path / "c.json",
               "--png", tmp_path / "c.png")
    assert "AUROC" in out and "unicorn" in out and "c.png" in out
    found = json.loads((tmp_path / "c.json").read_text())["categories"]
    rows = data.read_manifest(phantom, "train")
    labels = np.array([any("nodule" in r["phrase"] for r in row["regions"]) for row in rows])
    with torch.no_grad():
        image_emb = torch.cat([encoder.encode_image(row["path"]) for row in rows])
        phrases = Counter(r["phrase"] for row in rows for r in row["regions"]
                          if "nodule" in r["phrase"])
        assert 1 < len(phrases) <= 20                          # so all are among the most common
        yes = F.normalize(encoder.encode_text(list(phrases)).mean(0), dim=0)
        no = encoder.encode_text(["No nodule."])[0]
    score = (image_emb @ (yes - no)).numpy()
    pairs = [(a > b) for a in score[labels] for b in score[~labels]]
    assert found["Nodule"]["AUROC"] == pytest.approx(np.mean(pairs), abs=0.01)
    assert found["Nodule"]["n_images"] == labels.sum() > 0
    best = (image_emb @ yes).argsort(descending=True).numpy()
    for k in (1, 2, 5, 10):
        assert found["Nodule"][f"P@{k}"] == pytest.approx(labels[best[:k]].mean())
    few = retrieve.category_scores(encoder, rows[:3], image_emb[:3], "nodule")
    assert few["P@5"] == few["P@10"] == pytest.approx(labels[:3].mean())     # K above the pool
    assert found["unicorn"]["AUROC"] is None and found["unicorn"]["P@10"] == 0
    sheet = np.array(Image.open(tmp_path / "c.png")).astype(int)
    assert sheet.shape == (448, 4 * 360, 3)                    # nodule alone: no unicorn is there
    boxed = [r["boxes"][0] for row in rows for r in row["regions"] if "nodule" in r["phrase"]]
    for n, box in enumerate(boxed[:4]):
        cell = sheet[:360, n * 360:(n + 1) * 360]
        x0, y0, x1, y1 = [4 + round(v * 351) for v in box]
        edge = cell[y0:y1, x0 - 1:x0 + 2] == ImageColor.getrgb(data.COLOURS[0])
        assert edge.all(-1).any(1).all()
        assert 0.02 < (cell[..., 0] > cell[..., 2] + 30).mean() < 0.6      # warm colours


def test_a_heat_map_lies_where_it_is_hot(rows):
    """Guards: a map turned or mirrored over its image; an image that no longer shows."""
    image = data.load_image(rows[0]["path"])
    heat = np.zeros((6, 6))
    heat[1, 4] = 1.0                                           # row 1 of 6, column 4 of 6
    picture = np.asarray(retrieve.over_image(heat, image)).astype(int)
    warm = picture[..., 0] - picture[..., 2]
    y, x = np.unravel_index(warm.argmax(), warm.shape)
    assert abs(x / len(warm) - 4.5 / 6) < 0.1 and abs(y / len(warm) - 1.5 / 6) < 0.1
    assert warm[len(warm) // 2:].max() < 5 and picture[len(warm) // 2:].std() > 10


def test_search_by_image(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: the query among its own neighbours, neighbours that are not the nearest, a contact
    sheet without the query first or without boxes."""
    rows = data.read_manifest(phantom, "test")
    png, out = tmp_path / "new" / "sheet.png", tmp_path / "s.json"
    text = call(monkeypatch, capsys, "--checkpoint", encoder.source, "--data", phantom, "--k", 4,
                "--image", rows[2]["path"], "--png", png, "--json", out, "--device", "cpu")
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
    assert f"--lvlm lofi --image {rows[2]['path']} --phrase" in text
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


def test_search_by_text(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: a text compared with texts; a long one cut in silence; a split that is ignored."""
    monkeypatch.chdir(tmp_path)
    words = "Large left pleural effusion. " * 12
    text = call(monkeypatch, capsys, "--checkpoint", encoder.source, "--data", phantom, "--text",
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
    assert "to the text encoder's 32 tokens" in text and Path("runs/retrieve.png").is_file()


def test_a_copy_of_the_query_is_known_by_its_bytes(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: a copied or moved image found as its own nearest neighbour."""
    row = data.read_manifest(phantom, "test")[2]
    shutil.copy(row["path"], tmp_path / "copy.png")
    text = call(monkeypatch, capsys, "--checkpoint", encoder.source, "--data", phantom, "--image",
                tmp_path / "copy.png", "--k", 11, "--json", tmp_path / "s.json",
                "--png", tmp_path / "s.png")
    found = json.loads((tmp_path / "s.json").read_text())
    assert "left out" in text and found["n_images"] == 11
    assert row["image"] not in [one["image"] for one in found["results"]]


def test_a_small_pool_gives_what_it_has(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: the default --k refused on a pool of two images; a given --k lowered in silence."""
    flags = ("--checkpoint", encoder.source, "--data", phantom, "--split", "val", "--text", "Mass.",
             "--png", tmp_path / "s.png", "--json", tmp_path / "s.json")
    call(monkeypatch, capsys, *flags)
    assert len(json.loads((tmp_path / "s.json").read_text())["results"]) == 2
    with pytest.raises(InputError, match="k is 3, expected 1 to 2"):
        call(monkeypatch, capsys, *flags, "--k", 3)


def test_no_output_replaces_an_input(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: an X-ray, manifest or checkpoint overwritten by a picture or a result, through links
    too; found out after the work is done."""
    folder = shutil.copytree(phantom, tmp_path / "set")
    image = Path(data.read_manifest(folder, "train")[0]["path"])
    query, link = tmp_path / "query.png", tmp_path / "link.png"
    shutil.copy(image, query)
    link.symlink_to(image)
    inputs = [query, link, image, folder / "manifest.jsonl",
              Path(encoder.source, "model.safetensors"),
              Path(encoder.source, "tokenizer", "tokenizer.json")]
    before = [path.read_bytes() for path in inputs]
    monkeypatch.setattr(Encoder, "load", lambda *_: pytest.fail("checked too late"))
    flags = ("--checkpoint", encoder.source, "--data", folder)
    searches = [("--image", query, flag, path) for flag in ("--png", "--json") for path in inputs]
    tables = [("--json", path) for path in inputs[1:]]
    for some in (*searches, *tables, ("--categories", "nodule", "--png", image)):
        with pytest.raises(InputError, match="would be overwritten"):
            call(monkeypatch, capsys, *flags, *some)
    assert [path.read_bytes() for path in inputs] == before


def test_a_very_narrow_image_is_drawn(tmp_path):
    """Guards: a search that ends in a traceback at its contact sheet."""
    Image.new("L", (1, 20000)).save(tmp_path / "x.png")
    row = {"path": tmp_path / "x.png", "study": "s", "report": "r",
           "regions": [{"phrase": "p", "boxes": [[0, .1, 1, .5]]}]}
    assert retrieve.card("title", row).size == (360, 448)


def test_a_result_in_a_run_folder_can_be_written_again(tmp_path):
    """Guards: predictions in a run folder that cannot be continued; a run's own files replaced."""
    for name in ("table_1.json", "p.jsonl", "metrics.json", "config.json", "log.jsonl"):
        (tmp_path / name).write_text("{}")
    retrieve.check_outputs({".json": tmp_path / "table_1.json", ".jsonl": tmp_path / "p.jsonl"},
                           [], [], [tmp_path])
    for name in ("metrics.json", "config.json", "log.jsonl"):
        output = {Path(name).suffix: tmp_path / name}
        with pytest.raises(InputError, match="would be overwritten"):
            retrieve.check_outputs(output, [], [], [tmp_path])


def test_data_come_from_the_training_of_the_checkpoint(encoder, phantom, tmp_path, monkeypatch):
    """Guards: a run searched on the phantom that was trained on something else."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="runs/phantom_data, its data, .*give --data"):
        retrieve.trained_on(encoder.source)
    shutil.copytree(phantom, "runs/phantom_data")
    assert retrieve.trained_on(encoder.source) == "runs/phantom_data"
    trainer = Path(encoder.source) / "trainer.pt"
    for own, expected in ((str(phantom), str(phantom)),
                          ("/moved/phantom_data", "runs/phantom_data")):
        torch.save({"settings": {"data": own}}, trainer)
        assert retrieve.trained_on(encoder.source) == expected
    torch.save({"settings": {"data": "/elsewhere/mimic"}}, trainer)
    with pytest.raises(InputError, match="/elsewhere/mimic, its data, .*give --data"):
        retrieve.trained_on(encoder.source)
    trainer.write_bytes(b"half")
    with pytest.raises(InputError, match="damaged"):
        retrieve.trained_on(encoder.source)


@pytest.mark.parametrize("flags, words", [
    (("--checkpoint", "runs/phantom"), "no such checkpoint"),
    (("--checkpoint", "test only"), "no such checkpoint"),
    (("--image", __file__), "cannot be read as an image"), (("--k", 13, "--text", "x"), "1 to 12"),
    (("--data", "nowhere"), "no such file"), (("--device", "tpu9"), "tpu9"),
    (("--split", "val", "--data", "test only"), "pool is empty"),
    (("--png", "mine.txt", "--text", "x"), "expected a .png"), (("--json", "m.png"), "a .json")])
def test_invalid_input_gets_one_line(encoder, phantom, tmp_path, monkeypatch, capsys, flags, words):
    """Guards: a traceback, a search of something else than was asked for, a file half written."""
    monkeypatch.chdir(tmp_path)
    rows = [line for line in (phantom / "manifest.jsonl").read_text().splitlines()
            if '"test"' in line]
    shutil.copytree(phantom, "test only")
    Path("test only/manifest.jsonl").write_text("\n".join(rows))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words) as error:
        call(monkeypatch, capsys, "--checkpoint", encoder.source, "--data", phantom, *flags)
    assert "\n" not in str(error.value) and set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags, words", [
    (("--text", " "), "--text is empty"), (("--text", "caf\udce9"), "caf?: an argument is not"),
    (("--batch-size", "0"), "1 or more"),
    (("--categories", " ."), "an empty string"), (("--k", "0"), "1 or more"),
    (("--categories", "nodule", "--text", "x"), "not allowed with"), (("--wrong",), "--wrong"),
    (("--checkpoint", "a", "b", "--text", "x"), "expected one for a search")])
def test_a_wrong_flag_is_one_line(tmp_path, flags, words):
    """Guards: a flag that is ignored."""
    assert words in run(ROOT / "retrieve.py", *flags, cwd=tmp_path, ok=False)


def test_a_run_without_its_trainer_file_is_not_scored_on_the_phantom(tmp_path):
    """Guards: Table 1 on data that the run was not trained on, with exit code 0."""
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(InputError, match="trainer.pt: missing, so the run's data is not known"):
        retrieve.trained_on(tmp_path)


def test_an_error_is_one_line_and_an_exit_code(tmp_path):
    """Guards: a traceback where a person forgot to train."""
    line = run(ROOT / "retrieve.py", cwd=tmp_path, ok=False)
    assert line.startswith("retrieve.py: runs/phantom: no such checkpoint; python train.py")


def test_help_is_the_manual():
    """Guards: a flag that the design names and the parser lacks."""
    text = run(ROOT / "retrieve.py", "--help")
    for flag in "image text k checkpoint data split png json device batch-size".split():
        assert f"--{flag}" in text
    assert "Table 1" in text and "torchrun" in text


def test_torchrun_gives_the_embeddings_of_one_process(encoder, phantom, tmp_path):
    """Guards: images of a process lost or out of order, a result or a cache written twice,
    processes that wait for each other for ever."""
    rows = data.read_manifest(phantom)
    alone = retrieve.image_embeddings(encoder, phantom, rows, batch_size=8)
    [file] = cached(encoder)
    file.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(ROOT / "retrieve.py"), "--checkpoint", encoder.source, "--data", str(phantom),
               "--split", "all", "--batch-size", "8", "--device", "cpu",
               "--json", str(tmp_path / "t.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Image-to-Text") == 1 and done.stdout.count("Next:") == 1
    assert json.loads((tmp_path / "t.json").read_text())["n_images"] == 54
    assert cached(encoder) == [file]
    assert torch.allclose(lofi_model.read_weights(file)["emb"], alone, atol=1e-6)
