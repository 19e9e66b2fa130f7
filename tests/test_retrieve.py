"""Retrieval: exact top-k, cached embeddings, Table 1, and search as a person runs it."""

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
from PIL import Image
from transformers import SiglipModel

import data
import metrics
import model as lofi_model
import retrieve
from conftest import ROOT, SMALL, run
from model import LoFi, ModelError
from retrieve import RetrieveError, load_encoder, top_k


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
    return load_encoder(shutil.copytree(checkpoint, tmp_path / "run", ignore=lambda *_: [
        "embeddings"]))


def call(monkeypatch, capsys, *flags):
    """retrieve.main() with these flags -> what it prints."""
    monkeypatch.setattr(sys, "argv", ["retrieve.py", *map(str, flags)])
    capsys.readouterr()
    retrieve.main()
    return capsys.readouterr().out


# ---- exact top-k --------------------------------------------------------------------------------

def plain_top_k(queries, pool, k):
    """Whole-number dot products in Python's own integers, sorted by (-similarity, index)."""
    whole = lambda x: [[round(v * 2 ** 26) for v in row] for row in x.tolist()]
    queries, pool = whole(queries), whole(pool)
    best = []
    for q in queries:
        score = [sum(a * b for a, b in zip(q, p)) for p in pool]
        best.append(sorted(range(len(pool)), key=lambda i: (-score[i], i))[:k])
    return best


def pools():
    """Pools that are easy, full of equal rows, all nearly the same, and one row alone."""
    torch.manual_seed(0)
    easy = unit(400, 24)
    yield "easy", easy
    yield "equal rows", unit(30, 24)[torch.randint(0, 30, (400,))]
    yield "all equal", unit(1, 24).expand(150, -1).contiguous()
    yield "closer than float32 can tell", F.normalize(unit(1, 24) + 1e-7 * easy, dim=1)
    yield "one row", unit(1, 24)


@pytest.mark.parametrize("name, pool", list(pools()), ids=[name for name, _ in pools()])
def test_top_k_is_the_sorted_list(name, pool):
    """Guards: a neighbour lost between blocks or chunks, ties in any order, a near-tie decided by
    the last bit of a float32 matmul."""
    queries = torch.cat([unit(5, 24), pool[:2]])
    for k in sorted({1, min(7, len(pool)), len(pool)}):
        wanted = plain_top_k(queries, pool, k)
        for chunk in (1, 1000, 2 ** 20):
            similarity, index = top_k(queries, pool, k, chunk=chunk)
            assert index.tolist() == wanted, (name, k, chunk)
            cosine = (queries.double() @ pool.double().T).gather(1, index)
            assert torch.allclose(similarity.double(), cosine, atol=1e-6)
            assert (similarity[:, :-1] >= similarity[:, 1:]).all()


def test_a_pool_that_float32_cannot_order_is_gone_through(monkeypatch):
    """Guards: the spare candidates taken for enough where more rows than they are within float32's
    error; and the whole pool gone through for queries that need not."""
    asked, whole = [], retrieve.best_of_all
    monkeypatch.setattr(retrieve, "best_of_all",
                        lambda queries, *rest: asked.append(len(queries)) or whole(queries, *rest))
    torch.manual_seed(1)
    top_k(unit(6, 64), unit(5000, 64), 3)
    assert not asked
    top_k(unit(6, 64), F.normalize(unit(1, 64) + 1e-6 * unit(500, 64), dim=1), 3)
    assert sum(asked) == 6


@pytest.mark.parametrize("k", [0, -1, 10])
def test_top_k_refuses_a_k_that_the_pool_cannot_give(k):
    """Guards: fewer neighbours than asked for, or torch's own error."""
    with pytest.raises(RetrieveError, match=f"k is {k}, wanted 1 to 9"):
        top_k(unit(2, 4), unit(9, 4), k)


# ---- encoders -----------------------------------------------------------------------------------

def test_a_run_and_its_export_are_one_encoder(encoder, rows, tmp_path):
    """Guards: a second forward path for baselines; LoRA left out of a run; other normalisation."""
    lofi_model.export(encoder.source, tmp_path / "siglip")
    plain = load_encoder(tmp_path / "siglip")
    paths, texts = [row["path"] for row in rows[:5]], [row["report"] for row in rows[:5]]
    siglip = SiglipModel.from_pretrained(tmp_path / "siglip").eval()
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p).resize((32, 32), 2), np.float32))
                          for p in paths])[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    with torch.no_grad():
        wanted = F.normalize(siglip.get_image_features(pixel_values=pixels).pooler_output, dim=1)
        a, b = encoder.encode_image(paths), plain.encode_image(paths)
        assert torch.allclose(encoder.encode_text(texts), plain.encode_text(texts), atol=1e-6)
    assert torch.allclose(a, b, atol=1e-6) and torch.allclose(b, wanted, atol=1e-6)
    assert (plain.image_size, plain.text_length) == (32, 32)
    assert plain.source == str(tmp_path / "siglip") and not isinstance(plain, LoFi)


def breakages(folder):
    """(name, what to do to an exported folder, words of the error)"""
    weights, config = folder / "model.safetensors", folder / "config.json"
    yield lambda: (folder / "tokenizer_config.json").write_text("{"), "neither a run"
    yield lambda: weights.write_bytes(weights.read_bytes()[:5000]), "neither a run"
    yield weights.unlink, "no file named model.safetensors"
    yield lambda: config.write_text('{"model_type": "gemma3_text"}'), "is a gemma3_text model"
    yield config.unlink, "model_type"


def test_what_is_no_encoder_gets_one_line(encoder, tmp_path):
    """Guards: a traceback; a model of another kind loaded with random weights; a lost run looked
    for on the hub."""
    lofi_model.export(encoder.source, tmp_path / "siglip")
    for break_it, words in breakages(tmp_path / "siglip"):
        break_it()
        with pytest.raises(RetrieveError, match=words) as error:
            load_encoder(tmp_path / "siglip")
        assert "\n" not in str(error.value)
    with pytest.raises(RetrieveError, match="no such checkpoint"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(RetrieveError, match="hf auth login"):
        load_encoder("google/medsiglip-448")
    (Path(encoder.source) / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="cannot be read"):
        load_encoder(encoder.source)


# ---- embeddings and their cache -----------------------------------------------------------------

def cached(encoder):
    files = list((Path(encoder.source) / "embeddings").iterdir())
    assert len(files) == 1 and files[0].suffix == ".safetensors"        # no draft left either
    return files[0]


def count_films(encoder, monkeypatch):
    """How many films the encoder sees from here on -> a list that grows."""
    seen, encode = [], type(encoder).encode_image
    monkeypatch.setattr(type(encoder), "encode_image",
                        lambda self, films: seen.append(len(films)) or encode(self, films))
    return seen


def test_films_are_embedded_once(encoder, phantom, rows, monkeypatch):
    """Guards: rows in another order than asked for, a film embedded twice, a subset or superset of
    rows that is embedded anew."""
    wanted = torch.cat([encoder.encode_image(row["path"]) for row in rows]).detach()
    seen = count_films(encoder, monkeypatch)
    some = rows[20:5:-1]
    emb = retrieve.image_embeddings(encoder, phantom, some, batch_size=7)
    assert torch.allclose(emb, wanted[range(20, 5, -1)], atol=1e-6) and sum(seen) == 15
    emb = retrieve.image_embeddings(encoder, phantom / "manifest.jsonl", rows + rows[:3])
    assert torch.allclose(emb, torch.cat([wanted, wanted[:3]]), atol=1e-6) and sum(seen) == 40
    again = retrieve.image_embeddings(load_encoder(encoder.source), phantom, rows)
    assert torch.equal(again, emb[:40]) and sum(seen) == 40 and again.dtype == torch.float32
    with pytest.raises(RetrieveError, match="empty"):
        retrieve.image_embeddings(encoder, phantom, [])


def test_a_cache_that_is_stale_or_damaged_is_rebuilt(encoder, phantom, rows, monkeypatch, capsys):
    """Guards: neighbours by the weights of an earlier checkpoint; a truncated, altered or foreign
    file that is used, or that ends the run; the reason kept quiet."""
    good = retrieve.image_embeddings(encoder, phantom, rows).clone()
    file, seen = cached(encoder), count_films(encoder, monkeypatch)
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[whole.index(good[7].numpy().tobytes()) + 2] ^= 1
    foreign = (Path(encoder.source) / "model.safetensors").read_bytes()
    no_keys = whole.replace(b"keys", b"KEYS")
    for content in (whole[:len(whole) // 2], bytes(altered), b"", b"no tensors", foreign, no_keys):
        file.write_bytes(content)
        seen.clear()
        capsys.readouterr()
        assert torch.equal(retrieve.image_embeddings(encoder, phantom, rows), good)
        assert sum(seen) == 40 and "anew" in (text := capsys.readouterr().out)
        assert "damaged" in text
    assert cached(encoder).read_bytes() == whole
    with torch.no_grad():
        next(p for name, p in encoder.siglip.named_parameters()
             if "vision_model" in name and "lora_B" in name).add_(0.1)
    other = retrieve.image_embeddings(encoder, phantom, rows)
    assert "made with other weights" in capsys.readouterr().out
    assert not torch.allclose(other, good, atol=1e-3)


def test_a_film_that_changed_is_embedded_again(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: the embedding of a film that was replaced; the whole set embedded anew for one."""
    folder = shutil.copytree(phantom, tmp_path / "films")
    rows = data.read_manifest(folder, "train")
    good = retrieve.image_embeddings(encoder, folder, rows).clone()
    seen = count_films(encoder, monkeypatch)
    shutil.copy(rows[3]["path"], rows[5]["path"])
    emb = retrieve.image_embeddings(encoder, folder, rows)
    assert sum(seen) == 1 and "1 films changed" in capsys.readouterr().out
    assert torch.allclose(emb[5], good[3], atol=1e-6) and torch.equal(emb[6:], good[6:])
    assert len(retrieve.read_cache(cached(encoder), retrieve.settings_of(encoder))[0]) == 40


def test_a_stopped_embedding_goes_on(encoder, phantom, tmp_path, monkeypatch):
    """Guards: hours of embedding lost to one unreadable film; a message without its path."""
    folder = shutil.copytree(phantom, tmp_path / "films")
    rows = data.read_manifest(folder, "train")
    film = Path(rows[30]["path"])
    whole = film.read_bytes()
    film.write_bytes(whole[:100])
    monkeypatch.setattr(retrieve, "PART", 16)
    with pytest.raises(data.DataError, match=film.name):
        retrieve.image_embeddings(encoder, folder, rows, batch_size=8)
    film.write_bytes(whole)
    seen = count_films(encoder, monkeypatch)
    assert len(retrieve.image_embeddings(encoder, folder, rows, batch_size=8)) == 40
    assert sum(seen) == 24


def test_embeddings_without_a_place_to_keep_them(encoder, phantom, rows, tmp_path, monkeypatch,
                                                 capsys):
    """Guards: a finished embedding lost because its cache cannot be written; the cache of a hub's
    model put in a folder of its name."""
    monkeypatch.chdir(tmp_path)
    encoder.source = "google/siglip2"
    retrieve.image_embeddings(encoder, phantom, rows[:4])
    assert (tmp_path / "runs" / "embeddings" / "google--siglip2" / "phantom.safetensors").is_file()
    shutil.rmtree("runs")
    Path("runs").write_text("a file where the folder should be")
    assert len(retrieve.image_embeddings(encoder, phantom, rows[:4])) == 4
    assert "not kept" in capsys.readouterr().out


def test_long_texts_are_cut_and_said(encoder, capsys):
    """Guards: a text cut in silence; equal texts with embeddings that differ."""
    texts = ["No nodule.", "No nodule. " * 40, "No nodule."]
    emb = retrieve.text_embeddings(encoder, texts, batch_size=1)
    assert "cut to the text encoder's 32 tokens: 1 of 3 texts" in capsys.readouterr().out
    assert torch.equal(emb[0], emb[2]) and emb.shape == (3, 32)
    with torch.no_grad():
        assert torch.allclose(emb, encoder.encode_text(texts), atol=1e-6)
    retrieve.text_embeddings(encoder, texts[:1])
    assert not capsys.readouterr().out


# ---- Table 1 and neighbours ---------------------------------------------------------------------

@pytest.fixture
def studies(rows):
    """12 rows: two films of a study, reports of 1 to 3 sub-reports, one without a report."""
    words = 4 * [s for row in rows for s in data.split_sentences(row["report"])]
    few = [{**row, "report": " ".join(words[13 * i:13 * i + 1 + i])}
           for i, row in enumerate(rows[:12])]
    few[4] = {**few[4], "study": few[3]["study"]}
    few[6] = {**few[6], "report": ""}
    return few


def test_table_1_by_double_loops(encoder, studies):
    """Guards: sub-reports that belong to another film, a study that counts twice, a film without a
    report among the candidates, R@K of the wrong direction."""
    with torch.no_grad():
        emb = torch.cat([encoder.encode_image(row["path"]) for row in studies])
    table = data.sub_report_table(studies)
    result = retrieve.table_1(encoder, table, emb)
    films = [i for i in range(12) if i not in (4, 6)]
    texts = [(i, text) for i in films for text in data.sub_reports(studies[i]["report"])]
    assert table[0] == films and table[1] == [text for _, text in texts]
    assert max(np.bincount([i for i, _ in texts])) == 3
    with torch.no_grad():
        cosine = (emb @ encoder.encode_text([text for _, text in texts]).T).double().numpy()
    for k in (1, 5, 10):
        hits = [any(texts[j][0] == i for j in sorted(range(len(texts)),
                                                     key=lambda j: -cosine[i, j])[:k])
                for i in films]
        assert result["i2t"][f"R@{k}"] == pytest.approx(np.mean(hits))
        hits = [i in sorted(films, key=lambda f: -cosine[f, j])[:k]
                for j, (i, _) in enumerate(texts)]
        assert result["t2i"][f"R@{k}"] == pytest.approx(np.mean(hits))
    assert data.sub_report_table([{**row, "report": ""} for row in studies])[1] == []


def test_shared_findings_by_loops(rows):
    """Guards: size taken for a finding, the query's own patient among its neighbours, a chance that
    counts the query itself."""
    assert retrieve.findings({"regions": [
        {"phrase": "Small left  pleural effusion.", "boxes": [[0, 0, 1, 1]]},
        {"phrase": "The heart is moderately enlarged.", "boxes": [[0, 0, 1, 1]]},
        {"phrase": "No nodule.", "boxes": []}]}) == {"left pleural effusion.",
                                                     "the heart is enlarged."}
    rows = [{**row, "patient": f"p{i // 3}"} for i, row in enumerate(rows)]
    rows[8] = {**rows[8], "regions": []}
    torch.manual_seed(0)
    emb, near, chance = unit(len(rows), 8), [], []
    found = [retrieve.findings(row) for row in rows]
    for i in (i for i in range(len(rows)) if found[i]):
        others = [j for j in range(len(rows)) if j // 3 != i // 3]
        shares = {j: bool(found[i] & found[j]) for j in others}
        others.sort(key=lambda j: -float(emb[i] @ emb[j]))
        near.append(np.mean([shares[j] for j in others[:5]]))
        chance.append(np.mean(list(shares.values())))
    result = retrieve.shared_findings(rows, emb)["neighbours"]
    assert result == {"shared@5": pytest.approx(np.mean(near)),
                      "chance": pytest.approx(np.mean(chance)), "n_queries": len(near)}
    assert len(near) == 39 and 0 < result["chance"] < 1
    assert retrieve.shared_findings([{**row, "regions": []} for row in rows], emb) == {}


# ---- as a person runs it ------------------------------------------------------------------------

def test_table_1_for_several_checkpoints(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: a row that is missing or twice the same; keys of --json that are not the design's."""
    lofi_model.export(encoder.source, tmp_path / "siglip")
    flags = ("--data", phantom, "--device", "cpu", "--json", tmp_path / "t.json")
    text = call(monkeypatch, capsys, "--checkpoint", encoder.source, *flags)
    one = json.loads((tmp_path / "t.json").read_text())
    assert {"i2t", "t2i", "n_images", "seconds", "neighbours"} == set(one) and one["n_images"] == 12
    assert list(one["i2t"]) == list(one["t2i"]) == ["R@1", "R@5", "R@10", "R@20", "R@40"]
    for words in ("Image-to-Text", "Text-to-Image", "R@40", "by chance", "Next: python"):
        assert words in text
    text = call(monkeypatch, capsys, "--checkpoint", encoder.source, tmp_path / "siglip", *flags)
    both = json.loads((tmp_path / "t.json").read_text())
    assert list(both) == [encoder.source, str(tmp_path / "siglip")]
    assert all(both[source]["t2i"] == one["t2i"] for source in both)
    assert sum(line.startswith((encoder.source, str(tmp_path / "siglip")))
               for line in text.splitlines()) == 4


@pytest.mark.parametrize("sentence, category, wanted", [
    ("Two small nodules.", "nodule", True), ("Massive left pleural effusion.", "mass", False),
    ("Masses in both lungs.", "mass", True), ("Left pleural effusion.", "pleural effusion", True)])
def test_a_category_is_named_by_whole_words(sentence, category, wanted):
    """Guards: "massive" counted as a mass."""
    assert bool(retrieve.names(sentence, category)) == wanted


def test_categories_by_hand(encoder, phantom, tmp_path, monkeypatch, capsys):
    """Guards: "No nodule." read as a nodule; a score with its sign turned; a table of another
    split; a film's heat map scored with another film's boxes."""
    out = call(monkeypatch, capsys, "--checkpoint", encoder.source, "--data", phantom, "--split",
               "train", "--categories", "Nodule", "unicorn", "--json", tmp_path / "c.json")
    assert "AUROC" in out and "unicorn" in out
    found = json.loads((tmp_path / "c.json").read_text())["categories"]
    rows = data.read_manifest(phantom, "train")
    labels = np.array([any("nodule" in r["phrase"] for r in row["regions"]) for row in rows])
    with torch.no_grad():
        films = torch.cat([encoder.encode_image(row["path"]) for row in rows])
        phrases = Counter(r["phrase"] for row in rows for r in row["regions"]
                          if "nodule" in r["phrase"])
        assert 1 < len(phrases) <= 20                          # so all are among the commonest
        yes = F.normalize(encoder.encode_text(list(phrases)).mean(0), dim=0)
        no = encoder.encode_text(["No nodule."])[0]
    score = (films @ (yes - no)).numpy()
    pairs = [(a > b) for a in score[labels] for b in score[~labels]]
    assert found["Nodule"]["AUROC"] == pytest.approx(np.mean(pairs), abs=0.01)
    assert found["Nodule"]["n_images"] == labels.sum() > 0
    best = (films @ yes).argsort(descending=True)[:5].numpy()
    assert found["Nodule"]["P@5"] == pytest.approx(labels[best].mean())
    ratios = [metrics.contrast_to_noise_ratio(
        encoder.heat_map(row["path"], [r["phrase"]])[0].numpy(), r["boxes"])
        for row in rows for r in row["regions"] if "nodule" in r["phrase"]]
    assert found["Nodule"]["CNR"] == pytest.approx(np.nanmean(ratios), abs=1e-4)
    assert found["unicorn"]["AUROC"] is None and found["unicorn"]["P@10"] == 0


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
    sheet = np.array(Image.open(png))
    assert sheet.shape == (2 * 448, 3 * 360, 3)                # 5 cells
    assert sheet[1, 1].tolist() == [255, 165, 0] and sheet[1, 361].tolist() == [0, 0, 0]
    for n, row in enumerate([rows[2]] + found):
        cell = sheet[n // 3 * 448:][:360, n % 3 * 360:][:, :360]
        yellow = (cell == [255, 255, 0]).all(-1)
        for region in row["regions"]:
            x0, y0, x1, y1 = [4 + round(v * 351) for v in region["boxes"][0]]
            for x in (x0, x1):
                assert yellow[y0:y1, x - 1:x + 2].any(1).all(), row["image"]
            for y in (y0, y1):
                assert yellow[y - 1:y + 2, x0:x1].any(0).all(), row["image"]


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
    assert "cut to the text encoder's 32 tokens" in text and Path("runs/retrieve.png").is_file()


def test_data_come_from_the_training_of_the_checkpoint(encoder, phantom, tmp_path, monkeypatch):
    """Guards: a run searched on the phantom that was trained on something else."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RetrieveError, match="without a manifest.*--data"):
        retrieve.trained_on(encoder.source)
    shutil.copytree(phantom, "runs/phantom_data")
    assert retrieve.trained_on(encoder.source) == "runs/phantom_data"
    trainer = Path(encoder.source) / "trainer.pt"
    for own, wanted in ((str(phantom), str(phantom)), ("/moved/phantom_data", "runs/phantom_data")):
        torch.save({"settings": {"data": own}}, trainer)
        assert retrieve.trained_on(encoder.source) == wanted
    torch.save({"settings": {"data": "/elsewhere/mimic"}}, trainer)
    with pytest.raises(RetrieveError, match="/elsewhere/mimic is not there"):
        retrieve.trained_on(encoder.source)
    trainer.write_bytes(b"half")
    with pytest.raises(RetrieveError, match="damaged"):
        retrieve.trained_on(encoder.source)


@pytest.mark.parametrize("flags, words", [
    (("--checkpoint", "runs/phantom"), "no such checkpoint"), (("--text", " "), "empty"),
    (("--image", __file__), "cannot be read as an image"), (("--k", 13, "--text", "x"), "1 to 12"),
    (("--data", "nowhere"), "no such file"), (("--device", "tpu9"), "tpu9"),
    (("--split", "val", "--data", "test only"), "pool is empty"),
    (("--batch-size", 0), "1 or more"), (("--categories", " ."), "one is empty"),
    (("--categories", "nodule", "--text", "x"), "goes with Table 1"),
    (("--checkpoint", "a", "b", "--text", "x"), "wanted one for a search")])
def test_bad_flags_get_one_line(encoder, phantom, tmp_path, monkeypatch, capsys, flags, words):
    """Guards: a traceback, a search of something else than was asked for, a file half written."""
    monkeypatch.chdir(tmp_path)
    rows = [line for line in (phantom / "manifest.jsonl").read_text().splitlines()
            if '"test"' in line]
    shutil.copytree(phantom, "test only")
    Path("test only/manifest.jsonl").write_text("\n".join(rows))
    before = set(tmp_path.rglob("*"))
    with pytest.raises((RetrieveError, ModelError, data.DataError), match=words) as error:
        call(monkeypatch, capsys, "--checkpoint", encoder.source, "--data", phantom, *flags)
    assert "\n" not in str(error.value) and set(tmp_path.rglob("*")) == before


def test_an_error_is_one_line_and_an_exit_code(tmp_path):
    """Guards: a traceback where a person forgot to train."""
    line = run(ROOT / "retrieve.py", cwd=tmp_path, ok=False)
    assert line.startswith("retrieve.py: runs/phantom: no such checkpoint; python train.py")


def test_help_is_the_manual(monkeypatch, capsys):
    """Guards: a flag that the design names and the parser lacks."""
    with pytest.raises(SystemExit):
        call(monkeypatch, capsys, "--help")
    text = capsys.readouterr().out
    for flag in "image text k checkpoint data split png json device batch-size".split():
        assert f"--{flag}" in text
    assert "Table 1" in text and "torchrun" in text


def test_torchrun_gives_the_embeddings_of_one_process(encoder, phantom, rows, tmp_path):
    """Guards: films of a rank lost or out of order, a result or a cache written twice, ranks that
    wait for each other for ever."""
    retrieve.image_embeddings(encoder, phantom, data.read_manifest(phantom), batch_size=8)
    settings = retrieve.settings_of(encoder)
    keys, alone = retrieve.read_cache(cached(encoder), settings)
    cached(encoder).unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(ROOT / "retrieve.py"), "--checkpoint", encoder.source, "--data", str(phantom),
               "--split", "all", "--batch-size", "8", "--device", "cpu",
               "--json", str(tmp_path / "t.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Image-to-Text") == 1 and done.stdout.count("Next:") == 1
    assert json.loads((tmp_path / "t.json").read_text())["n_images"] == 54
    shared_keys, shared = retrieve.read_cache(cached(encoder), settings)
    assert shared_keys == keys and torch.allclose(shared, alone, atol=1e-6)
