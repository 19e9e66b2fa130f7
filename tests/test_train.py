"""train.py as a person runs it: the commands in subprocesses."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import train
from conftest import ROOT, run
from model import PAPER, TINY, LoFi

FAST = ("--preset", "tiny", "--batch-size", 8, "--device", "cpu")


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A run of 8 steps, with its evaluation."""
    out = tmp_path_factory.mktemp("runs") / "a"
    text = run("train.py", "--data", phantom, *FAST, "--steps", 8, "--out", out, "--save-every", 3)
    return out, text


def test_a_run_writes_what_it_promises(finished):
    """Guards: a missing file or key of the run folder; a log without a loss of the paper."""
    out, text = finished
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer",
                                               "trainer.pt", "log.jsonl", "metrics.json"}
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(1, 9))
    assert set(log[0]) == {"step", "lr", "loss", "sigmoid", "captioning", "grounding",
                           "dense_captioning", "samples_per_s"}
    scores = json.loads((out / "metrics.json").read_text())
    assert set(scores) == {"i2t", "t2i", "grounding", "prior", "seconds", "n_images"}
    assert list(scores["i2t"]) == ["R@1", "R@5", "R@10", "R@20", "R@40"]
    assert scores["n_images"] == 12
    assert scores["grounding"]["n_queries"] == scores["prior"]["n_queries"] > 12
    for words in ("trains", "image-to-text", "phrase prior", "Next:", "F@0.5"):
        assert words in text


def test_total_loss_in_the_log_is_made_of_its_parts(finished):
    """Guards: lambda forgotten, or a loss in the log that is not the one that trains."""
    out, _ = finished
    for line in log_of(out):
        parts = [line[k] for k in ("captioning", "grounding", "dense_captioning")
                 if line[k] is not None]
        low, high = (line["sigmoid"] + 5 * part for part in (min(parts), max(parts)))
        assert low - 1e-4 <= line["loss"] <= high + 1e-4


def test_resume_after_a_kill_is_the_unbroken_run(phantom, finished, tmp_path):
    """Guards: draws, optimizer or schedule that start over; log lines written twice or lost."""
    whole, _ = finished
    out = tmp_path / "b"
    command = ["train.py", "--data", phantom, *FAST, "--steps", 8, "--out", out, "--save-every", 3]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "trainer.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "metrics.json").exists()
    run(*command, "--resume")
    strip = lambda log: [{k: v for k, v in line.items() if k != "samples_per_s"} for line in log]
    assert strip(log_of(out)) == strip(log_of(whole))
    a, b = LoFi.from_pretrained(whole).state_dict(), LoFi.from_pretrained(out).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_wants_the_same_flags_and_a_whole_checkpoint(phantom, finished, tmp_path):
    """Guards: a resumed run on other data or another schedule; a damaged checkpoint loaded as it
    is."""
    out = tmp_path / "c"
    shutil.copytree(finished[0], out)
    command = ("train.py", "--data", phantom, *FAST, "--out", out, "--resume")
    assert "'steps': 8" in run(*command, "--steps", 9, ok=False)
    weights = (out / "trainer.pt").read_bytes()
    (out / "trainer.pt").write_bytes(weights[:len(weights) // 2])
    assert "damaged checkpoint" in run(*command, "--steps", 8, ok=False)
    text = run(*command[:-2], tmp_path / "none", "--resume", "--steps", 8, ok=False)
    assert "no checkpoint" in text


def test_an_older_run_is_moved_aside(phantom, finished, tmp_path):
    """Guards: a run overwritten by the next of its name."""
    out = tmp_path / "d"
    shutil.copytree(finished[0], out)
    text = run("train.py", "--data", phantom, *FAST, "--steps", 1, "--out", out,
               "--objectives", "s")
    assert "moved the older" in text
    assert len(log_of(tmp_path / "d.1")) == 8 and len(log_of(out)) == 1


def test_fine_tuning_starts_from_a_run_with_grounding_alone(phantom, finished, tmp_path):
    """Guards: --init that starts from random weights; objectives that train what was not asked
    for."""
    run("train.py", "--data", phantom, "--init", finished[0], "--objectives", "g", "--steps", 1,
        "--out", tmp_path / "e", "--batch-size", 8, "--device", "cpu")
    line = log_of(tmp_path / "e")[0]
    assert line["sigmoid"] is line["captioning"] is line["dense_captioning"] is None
    assert line["grounding"] > 0
    before, after = (LoFi.from_pretrained(p).state_dict() for p in (finished[0], tmp_path / "e"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("text_model" in name for name in changed)


def test_accumulated_gradients_are_those_of_the_batches(phantom, tmp_path):
    """Guards: gradients summed over batches instead of averaged, or batches skipped."""
    run("train.py", "--data", phantom, *FAST, "--steps", 2, "--accumulate", 2,
        "--out", tmp_path / "f", "--objectives", "s")
    keys = [list(train.batches(40, 8, 0, first, first + 2)) for first in (0, 2)]
    assert len({key for step in keys for batch in step for key in batch}) == 32
    assert len(log_of(tmp_path / "f")) == 2


def test_batches_cover_an_epoch_once():
    """Guards: an image drawn twice in an epoch; another order after a resume."""
    keys = [key for batch in train.batches(10, 3, 7, 0, 6) for key in batch]
    for epoch in (0, 1):
        some = [i for e, i in keys if e == epoch]
        assert len(some) == len(set(some)) == 9
    assert list(train.batches(10, 3, 7, 0, 6))[4:] == list(train.batches(10, 3, 7, 4, 6))


def test_learning_rate_warms_up_and_ends_near_0():
    """Guards: an annealing that ends high, a first step at full rate."""
    rates = [train.learning_rate(step, 1000, PAPER) for step in range(1000)]
    assert rates[0] < PAPER.lr / 10 and max(rates) > 0.99 * PAPER.lr and rates[-1] < 1e-3 * PAPER.lr
    assert PAPER.lr == 3e-4 and PAPER.epochs == 10 and PAPER.batch_size == 16 and PAPER.lam == 5


def test_dry_run_writes_nothing(phantom, tmp_path):
    """Guards: a dry run that leaves files, or that does not build and step."""
    before = set(tmp_path.rglob("*"))
    text = run("train.py", "--data", phantom, *FAST, "--dry-run", "--out", tmp_path / "g")
    assert "dry run" in text and set(tmp_path.rglob("*")) == before


def test_the_paper_preset_takes_any_siglip_and_gemma_folder(phantom, rows, tmp_path):
    """Guards: image size, patches or text length taken from the preset, not from the encoder's
    config."""
    from conftest import SMALL
    import dataclasses
    model = LoFi.build(dataclasses.replace(SMALL, lora_rank=0, llm_lora_rank=0),
                       data.tokenizer_texts(rows))
    for part, tokenizer, name in ((model.siglip, None, "siglip"),
                                  (model.llm, model.llm_tokenizer, "gemma")):
        part.save_pretrained(tmp_path / name)
        if tokenizer:
            tokenizer.save_pretrained(tmp_path / name)
    text = run("train.py", "--data", phantom, "--encoder", tmp_path / "siglip",
               "--llm", tmp_path / "gemma", "--steps", 2, "--batch-size", 4,
               "--out", tmp_path / "h", "--workers", 0, "--device", "cpu")
    assert "LoRA of the encoders" in text and "has no tokenizer" in text
    config = json.loads((tmp_path / "h" / "config.json").read_text())
    assert config["preset"] == "paper" and config["n_queries"] == 64
    assert len(log_of(tmp_path / "h")) == 2


@pytest.mark.parametrize("flags, words", [
    (("--data", "nowhere"), "no such file"), (("--objectives", "sx"), "letters of s, c, g, d"),
    (("--steps", "0"), "more than 0"), (("--init", "nowhere"), "not a run folder"),
    (("--colour", "red"), "unrecognized"), (("--device", "tpu9"), "tpu9"),
    (("--preset", "paper", "--encoder", "nowhere"), "nowhere")])
def test_bad_flags_get_one_line(phantom, tmp_path, flags, words):
    """Guards: a traceback, or a run that starts on something else than was asked for."""
    command = ["train.py", "--data", phantom, *FAST, "--out", tmp_path / "i", "--steps", 1]
    assert words in run(*command, *flags, ok=False)
    assert not (tmp_path / "i").exists()


def test_an_unreadable_training_image_stops_or_is_counted(phantom, tmp_path):
    """Guards: a film silently replaced by noise; a run that dies without the path."""
    folder = tmp_path / "data"
    shutil.copytree(phantom, folder)
    bad = folder / "images" / "train_00003.png"
    bad.write_bytes(bad.read_bytes()[:200])
    command = ["train.py", "--data", folder, *FAST, "--steps", 5, "--objectives", "s",
               "--out", tmp_path / "j"]
    assert "train_00003.png" in run(*command, "--workers", 2, ok=False)
    shutil.rmtree(tmp_path / "j")
    text = run(*command, "--skip-bad-images")
    assert "1 times an image could not be read" in text and "train_00003.png" in text


def test_help_is_the_manual():
    """Guards: a flag without an explanation, or one that the design names and the parser lacks."""
    text = run("train.py", "--help")
    for flag in ("data out preset encoder llm random-init init resume objectives lambda epochs "
                 "steps batch-size lr accumulate grad-checkpoint workers seed device dry-run "
                 "skip-bad-images").split():
        assert f"--{flag}" in text
    assert TINY.preset in text and "Eq. 1" in text


def test_autocast_is_bf16_or_fp16_by_the_gpu(monkeypatch):
    """Guards: fp16 without a scaler on a GPU that has bf16; half precision on a CPU unasked."""
    cuda = torch.device("cuda")
    for has_bf16, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
        assert train.choose_precision("auto", cuda) == wanted
    assert train.choose_precision("auto", torch.device("cpu")) == torch.float32
    assert train.choose_precision("bf16", torch.device("cpu")) == torch.bfloat16
