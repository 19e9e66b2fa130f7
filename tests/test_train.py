"""train.py as a person runs it, in subprocesses where the process matters."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import count

import pytest
import torch
from PIL import Image

import data
import train
from conftest import ROOT, SMALL, run
from metrics import InputError
from model import PAPER, TINY, LoFi

FAST = ("--preset", "tiny", "--batch-size", 8, "--device", "cpu")


def log_of(folder):
    """The log without its timing, and without the val losses, which come with checkpoints."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_s", "val")} for line in lines]


def weights_of(folder):
    return LoFi.from_pretrained(folder).state_dict()


def assert_same_run(a, b):
    """The same log, and the same weights bit for bit."""
    assert log_of(a) == log_of(b)
    a, b = weights_of(a), weights_of(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def main(monkeypatch, *flags):
    """train.py in this process -> stdout."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.main()
    return out.getvalue()


def start(*command, **options):
    """train.py in the background."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)


def wait_for_step(process, out, step):
    """Until the log has that many lines."""
    log = out / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < step):
        time.sleep(0.002)


@pytest.fixture(scope="module")
def odd(phantom):
    """A manifest of 37 training images and no test split: the last batch of 16 has 5."""
    path = phantom / "odd.jsonl"
    lines = (phantom / "manifest.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join([line for line in lines if '"split": "train"' in line][:37]))
    return path


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A run of 30 steps, with its evaluation."""
    out = tmp_path_factory.mktemp("runs") / "a"
    text = run("train.py", "--data", phantom, *FAST, "--steps", 30, "--out", out)
    return out, text


def test_a_run_writes_what_it_promises(finished):
    """Guards: a missing file or key of the run folder; a log without a loss of the paper."""
    out, text = finished
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer",
                                               "trainer.pt", "log.jsonl", "metrics.json",
                                               "curve.png", "README.md"}
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(1, 31))
    assert set(json.loads((out / "log.jsonl").read_text().splitlines()[0])) == {
        "step", "lr", "loss", "sigmoid", "captioning", "grounding", "dense_captioning",
        "samples_per_s"}
    scores = json.loads((out / "metrics.json").read_text())
    assert set(scores) == {"i2t", "t2i", "grounding", "prior", "seconds", "n_images"}
    assert list(scores["i2t"]) == ["R@1", "R@5", "R@10", "R@20", "R@40"]
    assert scores["n_images"] == 12
    assert scores["grounding"]["n_queries"] == scores["prior"]["n_queries"] > 12
    for words in ("trains", "Image-to-Text", "chance", "phrase prior", "Next:", "F@0.5"):
        assert words in text
    card = (out / "README.md").read_text()
    for words in ("not for clinical use", "--steps 30", "LoFi.from_pretrained", "baseline",
                  f"{100 * scores['grounding']['F@0.5']:.2f}", "commit"):
        assert words in card
    assert Image.open(out / "curve.png").size == (840, 600)


def test_the_next_commands_work(finished):
    """Guards: a command to paste that names a file which is not there."""
    _, text = finished
    for line in text.split("Next:")[1].strip().splitlines()[:2]:
        script, *flags = shlex.split(line)[1:]
        out = ["--out", finished[0].parent / "o.png"] if script == "icl_ground.py" else [
            "--png", finished[0].parent / "o.png"]
        run(script, *flags, *out)
    assert (finished[0].parent / "o.png").exists()


def test_val_losses_are_logged_and_reproducible(phantom, finished, tmp_path, monkeypatch):
    """Guards: losses on the val split that are those of train, or that disturb the training.

    Oracle: the same run without a val split."""
    last = json.loads((finished[0] / "log.jsonl").read_text().splitlines()[-1])
    assert set(last["val"]) == set(train.LOSSES) and last["val"]["loss"] > 0
    assert last["val"]["loss"] != last["loss"]
    path, text = phantom / "no_val.jsonl", (phantom / "manifest.jsonl").read_text()
    path.write_text("".join(line for line in text.splitlines(keepends=True)
                            if '"split": "val"' not in line))
    main(monkeypatch, "--data", path, *FAST, "--steps", 30, "--out", tmp_path / "v")
    assert log_of(finished[0]) == log_of(tmp_path / "v")


def gradients_of(monkeypatch, *flags):
    """The gradient of each step of a run, as it is clipped."""
    clip, gradients = torch.nn.utils.clip_grad_norm_, []

    def keep(parameters, most):
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip(parameters, most)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        main(monkeypatch, *flags)
    return gradients


@pytest.mark.parametrize("name", ["sigmoid_loss", "captioning_loss", "grounding_loss",
                                  "dense_captioning_loss", "total_loss"])
def test_each_named_loss_is_the_one_that_trains(odd, name, tmp_path, monkeypatch):
    """Guards: a loss function on the page through which no gradient flows."""
    flags = ["--data", odd, *FAST, "--steps", 1, "--workers", 0, "--batch-size", 16]
    [before] = gradients_of(monkeypatch, *flags, "--out", tmp_path / "a")
    loss = getattr(train, name)
    monkeypatch.setattr(train, name, lambda *args: 4 * loss(*args))
    [after] = gradients_of(monkeypatch, *flags, "--out", tmp_path / "b")
    change = (after - before).norm() / before.norm()
    assert change == pytest.approx(3, abs=1e-3) if name == "total_loss" else change > 1e-4


def test_total_loss_in_the_log_is_made_of_its_parts(finished):
    """Guards: lambda forgotten, or a loss in the log that is not the one that trains."""
    out, _ = finished
    for line in log_of(out):
        parts = [line[k] for k in ("captioning", "grounding", "dense_captioning")
                 if line[k] is not None]
        low, high = (line["sigmoid"] + 5 * part for part in (min(parts), max(parts)))
        assert low - 1e-4 <= line["loss"] <= high + 1e-4


def test_resume_after_kills_is_the_unbroken_run(phantom, finished, tmp_path):
    """Guards: draws, optimizer or schedule that start over; log lines written twice or lost; a
    kill before the first checkpoint, or at any later moment, that a run cannot go on from."""
    out, moments = tmp_path / "b", random.Random()
    command = ["train.py", "--data", phantom, *FAST, "--steps", 30, "--out", out,
               "--save-every", 4]
    process = start(*command)
    wait_for_step(process, out, moments.choice([1, 2, 3]))
    process.kill()
    process.wait()
    assert not (out / "metrics.json").exists()
    process = start(*command, "--resume")
    wait_for_step(process, out, moments.randrange(5, 25))
    process.kill()
    process.wait()
    run(*command, "--resume")
    assert_same_run(finished[0], out)


def test_a_torn_log_is_continued(phantom, finished, tmp_path, monkeypatch):
    """Guards: a run that can't go on, or whose log can't be read, as its last line is torn."""
    out = shutil.copytree(finished[0], tmp_path / "t")
    whole = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(whole[:-20])
    main(monkeypatch, "--data", phantom, *FAST, "--steps", 30, "--out", out, "--resume")
    assert log_of(out) == log_of(finished[0])[:-1]


def test_an_error_of_ours_ends_the_run(phantom, tmp_path):
    """Guards: a process that waits for ever for its workers, which ignore SIGTERM."""
    program = ("import sys, train\n"
               "def validate(*_): raise RuntimeError('a bug')\n"
               "train.validate = validate\ntrain.main()")
    flags = ["--data", phantom, *FAST, "--out", tmp_path / "b", "--workers", 2, "--steps", 40,
             "--save-every", 2]
    done = subprocess.run([sys.executable, "-c", program, *map(str, flags)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "RuntimeError: a bug" in done.stderr


def test_of_two_runs_into_a_new_folder_one_goes_on(odd, tmp_path, monkeypatch):
    """Guards: a running folder renamed by a run that was started in the same second."""
    out, check = tmp_path / "two", train.run_folder

    def meanwhile(*args):                                      # the other one is faster
        check(*args)
        out.mkdir()
        locks.append(train.metrics.lock(out / "log.jsonl"))
        return out
    locks = []
    monkeypatch.setattr(train, "run_folder", meanwhile)
    with pytest.raises(InputError, match="another process is writing"):
        main(monkeypatch, "--data", odd, *FAST, "--steps", 1, "--out", out, "--workers", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    assert [path.name for path in out.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(phantom, finished, tmp_path, number):
    """Guards: work lost to Ctrl-C or a cluster's SIGTERM; a checkpoint of half a step."""
    out = tmp_path / "s"
    command = ["train.py", "--data", phantom, *FAST, "--steps", 30, "--out", out]
    process = start(*command)
    wait_for_step(process, out, 2)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 128 + number, error
    assert "stopped and saved after step" in error and "--resume" in error
    assert "Traceback" not in error
    run(*command, "--resume")
    assert_same_run(finished[0], out)


def test_two_processes_are_one_with_twice_the_batch(odd, model, tmp_path):
    """Guards: a sigmoid loss within each process's batch, texts gathered without their gradient,
    means of means over unequal parts, images drawn twice or left out, two processes writing.

    By AdamW: Muon's bfloat16 would hide a small difference."""
    model.save_pretrained(tmp_path / "start")
    command = ["train.py", "--data", odd, "--init", tmp_path / "start", "--steps", 5, "--device",
               "cpu", "--workers", 0, "--out"]
    run(*command, tmp_path / "one", "--batch-size", 16)
    run("-m", "torch.distributed.run", "--nproc_per_node=2", *command, tmp_path / "two",
        "--batch-size", 8)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 5
    for a, b in zip(one, two):
        assert {k: pytest.approx(v, abs=2e-5) for k, v in a.items()} == b
    start, one, two = (weights_of(tmp_path / name) for name in ("start", "one", "two"))
    assert max((one[name] - start[name]).abs().max() for name in one) > 2e-3
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4


def break_loss(monkeypatch, broken):
    """Make L_t NaN in the steps (from 1) of the set."""
    whole, calls = train.total_loss, count(1)
    monkeypatch.setattr(train, "total_loss", lambda *args: whole(*args) * (
        float("nan") if next(calls) in broken else 1))


def test_a_loss_that_is_not_finite_skips_the_step(odd, tmp_path, monkeypatch):
    """Guards: NaN in the weights; a run that dies of one bad batch, or never of bad data."""
    flags = ["--data", odd, *FAST, "--workers", 0]
    with monkeypatch.context() as patch:
        break_loss(patch, {2, 3})
        text = main(patch, *flags, "--steps", 5, "--out", tmp_path / "k")
    assert "skipped 2 steps" in text
    assert [line["loss"] is None for line in log_of(tmp_path / "k")] == [
        False, True, True, False, False]
    assert all(v.isfinite().all() for v in weights_of(tmp_path / "k").values())
    break_loss(monkeypatch, range(99))
    with pytest.raises(InputError, match="in 5 steps.*train_000"):
        main(monkeypatch, *flags, "--steps", 9, "--out", tmp_path / "l")


def test_fp16_ends_when_its_scale_cannot_be_lowered(odd, tmp_path, monkeypatch):
    """Guards: gradients that are never finite, skipped by the scaler until the end without a word;
    the steps in which it lowers its scale from 2 ** 16 taken for a diverging run."""
    flags = ["--data", odd, *FAST, "--workers", 0, "--precision", "fp16", "--out"]
    assert "skipped" not in main(monkeypatch, *flags, tmp_path / "h", "--steps", 3)
    whole = train.total_loss
    monkeypatch.setattr(train, "total_loss", lambda *losses: 1e9 * whole(*losses))
    with pytest.raises(InputError, match="step 21: no finite loss or gradient in 5 steps"):
        main(monkeypatch, *flags, tmp_path / "i", "--steps", 30)


@pytest.mark.parametrize("broken, steps", [({3, 4}, 4), ({1, 2, 4, 5}, 6)])
def test_a_diverged_run_is_not_saved_or_scored(odd, tmp_path, monkeypatch, broken, steps):
    """Guards: a model that learned nothing, scored with exit code 0; weights of a diverging run
    saved over its last good checkpoint."""
    out = tmp_path / "q"
    break_loss(monkeypatch, broken)
    with pytest.raises(InputError, match="of .* steps were skipped"):
        main(monkeypatch, "--data", odd, *FAST, "--workers", 0, "--steps", steps, "--out", out,
             "--save-every", 2)
    assert not (out / "metrics.json").exists()
    if broken == {3, 4}:                                       # saved after step 2, not after 4
        assert torch.load(out / "trainer.pt", weights_only=True)["step"] == 2


def test_a_full_disk_leaves_the_last_good_checkpoint(odd, tmp_path, monkeypatch):
    """Guards: half a checkpoint over a whole one. The limit on a file's size stands for a disk."""
    flags = ["--data", odd, *FAST, "--workers", 0, "--out", tmp_path / "m", "--steps", 3]
    main(monkeypatch, *flags, "--save-every", 2)
    good = (tmp_path / "m" / "trainer.pt").read_bytes()
    model = LoFi.from_pretrained(tmp_path / "m")
    optimizers, scaler = train.build_optimizers(model, model.config), torch.amp.GradScaler("cpu")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100_000, 7_000_000):                          # too little for either file, for one
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(InputError, match="is not saved.*--resume; a checkpoint"):
                train.save_run(tmp_path / "m", model, optimizers, scaler, 3,
                               {"steps": "x" * 8_000_000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "m" / "trainer.pt").read_bytes() == good
    assert not list((tmp_path / "m").glob("*.tmp"))
    main(monkeypatch, *flags, "--save-every", 2, "--resume")


def test_out_of_memory_says_what_to_lower(odd, tmp_path, monkeypatch):
    """Guards: a traceback where a smaller batch is all that is needed; another error hidden."""
    def fail(words, kind=RuntimeError):
        def backward(*_, **__):
            raise kind(words)
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        flags = ("--data", odd, *FAST, "--steps", 1, "--workers", 0, "--out", tmp_path / "n")
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    with pytest.raises(SystemExit, match="out of memory; lower --batch-size"):
        fail("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: "
             "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)")
    with pytest.raises(SystemExit, match="out of memory.*metrics.py --bootstrap"):
        fail("", MemoryError)                                  # NumPy's and Python's
    with pytest.raises(RuntimeError, match="shapes differ"):
        fail("shapes differ")


def test_processes_of_one_run_do_not_lock_each_other_out(tmp_path):
    """Guards: torchrun --resume refused now and then, as two processes check the folder at once."""
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    args = argparse.Namespace(data=None, out=tmp_path, resume=True)
    with train.metrics.lock(tmp_path / "log.jsonl"):           # the first process, at this moment
        assert train.run_folder(args, rank=1) == tmp_path
        with pytest.raises(InputError, match="another process is writing"):
            train.run_folder(args, rank=0)


def test_workers_do_not_change_the_batches(odd, tmp_path, monkeypatch):
    """Guards: random draws that depend on which process decodes an image."""
    for workers in (0, 2):
        main(monkeypatch, "--data", odd, *FAST, "--steps", 3, "--workers", workers,
             "--out", tmp_path / str(workers))
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_resume_expects_the_same_flags_and_a_whole_checkpoint(phantom, finished, tmp_path,
                                                              monkeypatch):
    """Guards: a resumed run on other data or another schedule; a damaged checkpoint loaded as it
    is."""
    out = tmp_path / "c"
    shutil.copytree(finished[0], out)
    command = ("--data", phantom, *FAST, "--out", out, "--resume")
    for flags, words in (((*command, "--steps", 31), "'steps': 30"),
                         ((*command[:-2], tmp_path / "none", "--resume"), "no run to resume")):
        with pytest.raises(InputError, match=words):
            main(monkeypatch, *flags)
    whole, rng = (out / "trainer.pt").read_bytes(), random.Random(0)
    flipped = []
    for _ in range(4):                                         # among the weights
        content, place = bytearray(whole), rng.randrange(len(whole) // 4, len(whole) // 2)
        content[place] ^= 4
        flipped.append(bytes(content))
    for damaged in (whole[:len(whole) // 2], b"", b"no checkpoint", *flipped):
        (out / "trainer.pt").write_bytes(damaged)
        with pytest.raises(InputError, match="trainer.pt: damaged"):
            main(monkeypatch, *command, "--steps", 30)
    torch.save({"step": 3}, out / "trainer.pt")
    with pytest.raises(InputError, match="not a checkpoint of this train.py"):
        main(monkeypatch, *command, "--steps", 30)


def test_a_run_goes_on_where_its_data_have_moved(phantom, finished, tmp_path, monkeypatch):
    """Guards: a run that only resumes at one path; a manifest that was changed since, unsaid."""
    shutil.copytree(finished[0], tmp_path / "run")
    moved = shutil.copytree(phantom, tmp_path / "moved")
    flags = ("--data", moved, *FAST, "--steps", 30, "--out", tmp_path / "run", "--resume")
    assert "saved" in main(monkeypatch, *flags)
    (moved / "manifest.jsonl").open("a").write("\n")
    with pytest.raises(InputError, match="manifest"):
        main(monkeypatch, *flags)


def test_an_older_run_is_renamed(odd, finished, tmp_path, monkeypatch):
    """Guards: a run overwritten by the next of its name."""
    out = tmp_path / "d"
    shutil.copytree(finished[0], out)
    text = main(monkeypatch, "--data", odd, *FAST, "--steps", 1, "--out", out, "--objectives", "s",
                "--workers", 0)
    assert "renamed the older run" in text
    assert len(log_of(tmp_path / "d.1")) == 30 and len(log_of(out)) == 1


@pytest.mark.parametrize("name", ["data", "project", "file", "run", ".", "runs/phantom_data"])
def test_what_is_not_a_run_is_never_renamed(phantom, finished, tmp_path, monkeypatch, name):
    """Guards: a data set, its parent, a file, a run with foreign files, or the working folder moved
    out of the way."""
    shutil.copytree(phantom, tmp_path / "project" / "data")
    shutil.copytree(phantom, tmp_path / "data")
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="--out"):
        main(monkeypatch, "--data", "project/data", *FAST, "--steps", 1, "--out", name)
    monkeypatch.chdir(finished[0])                             # a run, but it is where we are
    with pytest.raises(InputError, match="working folder"):
        main(monkeypatch, "--data", phantom, *FAST, "--steps", 1, "--out", ".")
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_leaves_a_foreign_folder_as_it_is(odd, tmp_path, monkeypatch):
    """Guards: a log, config and README of the user's that are emptied or replaced."""
    for name in ("log.jsonl", "config.json", "README.md"):
        (tmp_path / name).write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match="no log.jsonl of one"):
        main(monkeypatch, "--data", odd, *FAST, "--steps", 1, "--resume", "--out", tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {
        '{"mine": 1}\n'}


def test_a_run_is_locked_until_its_scores_are_written(odd, tmp_path, monkeypatch):
    """Guards: a folder that another run renames meanwhile; that run's folder with our scores."""
    def finish_run(out, *_):
        with pytest.raises(InputError, match="another process is writing"):
            train.metrics.lock(out / "log.jsonl")
        finished.append(out)
    finished = []
    monkeypatch.setattr(train, "finish_run", finish_run)
    main(monkeypatch, "--data", odd, *FAST, "--steps", 1, "--out", tmp_path / "e", "--workers", 0)
    assert finished == [tmp_path / "e"]


def test_two_runs_on_one_folder(phantom, tmp_path, monkeypatch):
    """Guards: two processes that truncate each other's log; a lock that outlives a killed run."""
    out = tmp_path / "w"
    command = ["train.py", "--data", phantom, *FAST, "--steps", 3000, "--out", out]
    first = start(*command)
    wait_for_step(first, out, 2)
    for extra in ((), ("--resume",)):
        with pytest.raises(InputError, match="another process is writing"):
            main(monkeypatch, *command[1:], *extra)
    first.kill()
    first.wait()
    main(monkeypatch, "--data", phantom, *FAST, "--steps", 2, "--out", out, "--objectives", "s")
    assert len(log_of(out)) == 2 and (tmp_path / "w.1").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_to_the_whole_group_saves(phantom, tmp_path, workers):
    """Guards: workers that die of the signal and take the run with them (timeout, scancel)."""
    out = tmp_path / "s"
    process = start("train.py", "--data", phantom, *FAST, "--steps", 3000, "--out", out,
                    "--workers", workers, start_new_session=True)
    wait_for_step(process, out, 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "stopped and saved" in error, error
    assert torch.load(out / "trainer.pt", weights_only=True)["step"] == len(log_of(out))


def test_sigterm_to_torchrun_saves(phantom, tmp_path):
    """Guards: a second signal, which torchrun passes on, taken for impatience."""
    out = tmp_path / "s"
    process = start("-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", "--data",
                    phantom, *FAST, "--steps", 3000, "--out", out, start_new_session=True)
    wait_for_step(process, out, 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=90)
    assert process.returncode != 0 and "stopped and saved" in error, error[-2000:]
    assert torch.load(out / "trainer.pt", weights_only=True)["step"] == len(log_of(out))


def test_another_number_of_processes_is_said(phantom, finished, tmp_path):
    """Guards: a resumed run that trains on other batches than an unbroken one, silently."""
    path, out = phantom / "five.jsonl", tmp_path / "x"
    lines = [line for line in (phantom / "manifest.jsonl").open() if '"split": "train"' in line]
    path.write_text("".join(lines[:13]))                       # batches of 4: the last has 1 image
    flags = ["--data", path, "--preset", "tiny", "--objectives", "c", "--device", "cpu",
             "--workers", 0, "--out", out, "--steps"]
    run("train.py", *flags, 2, "--batch-size", 4)
    error = run("-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", *flags, 2,
                "--batch-size", 2, "--resume", ok=False, whole=True)
    assert "batches an epoch" in error and "number of processes" in error


def test_fine_tuning_on_two_processes(odd, model, tmp_path):
    """Guards: an objective left out that ends in a traceback under torchrun."""
    model.save_pretrained(tmp_path / "start")
    run("-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", "--data", odd, "--init",
        tmp_path / "start", "--objectives", "g", "--steps", 2, "--batch-size", 4, "--device", "cpu",
        "--workers", 0, "--out", tmp_path / "g")
    assert [line["grounding"] > 0 for line in log_of(tmp_path / "g")] == [True, True]


def test_a_small_set_keeps_its_negatives(phantom, tmp_path, monkeypatch):
    """Guards: steps of one image, whose sigmoid loss falls to nothing without negatives."""
    path = phantom / "eight.jsonl"
    lines = [line for line in (phantom / "manifest.jsonl").open() if '"split": "train"' in line]
    path.write_text("".join(lines[:8]))
    flags = ["--data", path, "--preset", "tiny", "--device", "cpu", "--workers", 0, "--steps", 2]
    text = main(monkeypatch, *flags, "--out", tmp_path / "y")
    assert "steps of 8 images: the training split" in text and "2 steps of 8" in text
    assert all(line["sigmoid"] > 1 for line in log_of(tmp_path / "y"))
    path.write_text(lines[0])
    with pytest.raises(InputError, match="two for the sigmoid loss"):
        main(monkeypatch, *flags, "--out", tmp_path / "z")


def test_fine_tuning_starts_from_a_run_with_grounding_only(odd, finished, tmp_path, monkeypatch):
    """Guards: --init that starts from random weights; objectives that train what was not asked
    for."""
    main(monkeypatch, "--data", odd, "--init", finished[0], "--objectives", "g", "--steps", 1,
         "--out", tmp_path / "e", "--batch-size", 8, "--device", "cpu", "--workers", 0)
    line = log_of(tmp_path / "e")[0]
    assert line["sigmoid"] is line["captioning"] is line["dense_captioning"] is None
    assert line["grounding"] > 0
    assert "not evaluated: no test split" in (tmp_path / "e" / "README.md").read_text()
    before, after = weights_of(finished[0]), weights_of(tmp_path / "e")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("text_model" in name for name in changed)


def test_a_batch_that_asks_nothing_is_a_step(odd, tmp_path, monkeypatch):
    """Guards: a traceback in backward() where augmentation has moved all regions of a batch out
    of its window."""
    monkeypatch.setattr(data, "augment", lambda image, regions, *_: (image.resize((60, 60)), []))
    main(monkeypatch, "--data", odd, *FAST, "--steps", 2, "--objectives", "g", "--workers", 0,
         "--out", tmp_path / "n", "--augment", 1)
    assert [line["loss"] for line in log_of(tmp_path / "n")] == [0, 0]
    assert all(v.isfinite().all() for v in weights_of(tmp_path / "n").values())


@pytest.mark.parametrize("regions", [[], [{"phrase": "Heart.", "boxes": []}]])
def test_evaluation_without_training_boxes_has_no_prior(phantom, regions, tmp_path, monkeypatch):
    """Guards: a run that trains for days and fails at its end, before metrics.json."""
    path = phantom / f"unboxed{len(regions)}.jsonl"
    rows = map(json.loads, (phantom / "manifest.jsonl").read_text().splitlines())
    path.write_text("".join(json.dumps({**row, "regions": regions if row["split"] == "train" else
                                        row["regions"]}) + "\n" for row in rows))
    text = main(monkeypatch, "--data", path, *FAST, "--steps", 1, "--out", tmp_path / "u",
                "--objectives", "sc", "--workers", 0)
    found = json.loads((tmp_path / "u" / "metrics.json").read_text())
    assert "prior" not in found and found["grounding"]["n_queries"] > 0
    assert "LoFi" in text and "phrase prior" not in text


def test_the_same_command_and_resume_before_the_first_checkpoint(odd, finished, tmp_path,
                                                                 monkeypatch):
    """Guards: --init that --resume refuses or forgets."""
    flags = ["--data", odd, "--init", finished[0], "--objectives", "g", "--steps", 1,
             "--batch-size", 8, "--device", "cpu", "--workers", 0]
    main(monkeypatch, *flags, "--out", tmp_path / "o")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "log.jsonl").touch()                     # as a kill at step 0 leaves it
    main(monkeypatch, *flags, "--out", tmp_path / "p", "--resume")
    assert_same_run(tmp_path / "o", tmp_path / "p")


def test_accumulated_gradients_are_the_mean_of_the_batches(odd, tmp_path, monkeypatch):
    """Guards: gradients summed over batches instead of averaged, or batches skipped."""
    flags = ("--data", odd, *FAST, "--objectives", "s", "--workers", 0, "--lr", 1e-12)
    [both] = gradients_of(monkeypatch, *flags, "--steps", 1, "--accumulate", 2, "--out",
                          tmp_path / "f1")
    first, second = gradients_of(monkeypatch, *flags, "--steps", 2, "--out", tmp_path / "f2")
    assert torch.allclose(both, (first + second) / 2, atol=1e-6) and both.norm() > 0.01
    assert len(log_of(tmp_path / "f1")) == 1


def test_batches_cover_an_epoch_once():
    """Guards: an image drawn twice in an epoch; another order after a resume."""
    keys = [key for batch in train.batches(10, 3, 4, 7, 0, 6) for key in batch]
    for epoch in (0, 1):                                       # of 4 batches, and 2 of the second
        drawn = [i for e, i in keys if e == epoch]
        assert len(drawn) == len(set(drawn)) == (10 if epoch == 0 else 6)
    assert list(train.batches(10, 3, 4, 7, 0, 6))[3:] == list(train.batches(10, 3, 4, 7, 3, 6))


@pytest.mark.parametrize("n, world", [(10, 2), (9, 2), (13, 3), (8, 4)])
def test_processes_share_an_epoch_without_repeats(n, world):
    """Guards: an image drawn by two processes; a process without an image in a batch."""
    n_batches = train.batches_per_epoch(n, 4, "c", world)
    parts = [list(train.batches(n, 4, n_batches, 0, 0, n_batches, rank, world))
             for rank in range(world)]
    drawn = [key for part in parts for batch in part for key in batch]
    assert len(drawn) == len(set(drawn)) >= n - world + 1
    assert all(batch for part in parts for batch in part)


def test_learning_rate_warms_up_and_ends_near_0():
    """Guards: an annealing that ends high, a first step at full rate."""
    rates = [train.learning_rate(step, 1000, PAPER) for step in range(1000)]
    assert rates[0] < PAPER.lr / 10 and max(rates) > 0.99 * PAPER.lr and rates[-1] < 1e-3 * PAPER.lr
    assert PAPER.lr == 3e-4 and PAPER.epochs == 10 and PAPER.batch_size == 16 and PAPER.lam == 5


def test_muon_takes_the_hidden_matrices(rows):
    """Guards: embeddings or queries orthogonalized, a parameter that no optimizer has, or two."""
    model = LoFi.build(TINY, data.tokenizer_texts(rows))
    adamw, muon = train.build_optimizers(model, TINY)
    name_of = {p: name for name, p in model.named_parameters() if p.requires_grad}
    hidden, rest = ([name_of[p] for group in optimizer.param_groups for p in group["params"]]
                    for optimizer in (muon, adamw))
    assert sorted(hidden + rest) == sorted(name_of.values())
    assert all(name.endswith("weight") and "embed" not in name for name in hidden)
    assert "pooling.queries" in rest and "pooling.projection.weight" in hidden
    assert {g["rate"] for g in muon.param_groups} == {TINY.muon_lr, TINY.muon_lr * TINY.text_lr}


def test_a_model_without_its_trainer_file_is_kept(odd, tmp_path, monkeypatch):
    """Guards: --resume where trainer.pt was deleted, to save space: a new run over the weights."""
    out, flags = tmp_path / "run", ["--data", odd, *FAST, "--workers", 0, "--steps", 1]
    main(monkeypatch, *flags, "--out", out)
    before = (out / "model.safetensors").read_bytes()
    (out / "trainer.pt").unlink()
    text = main(monkeypatch, *flags, "--seed", 1, "--out", out, "--resume")
    assert f"renamed the older run {out} to {out}.1" in text
    assert (tmp_path / "run.1" / "model.safetensors").read_bytes() == before
    assert (out / "model.safetensors").read_bytes() != before


def test_dry_run_writes_nothing(phantom, tmp_path, monkeypatch):
    """Guards: a dry run that leaves files, or that does not build and step."""
    before = set(tmp_path.rglob("*"))
    text = main(monkeypatch, "--data", phantom, *FAST, "--dry-run", "--out", tmp_path / "g")
    assert "dry run" in text and set(tmp_path.rglob("*")) == before


def test_the_paper_preset_takes_any_siglip_and_gemma_folder(odd, rows, tmp_path, monkeypatch):
    """Guards: image size, patches or text length taken from the preset, not from the encoder's
    config."""
    model = LoFi.build(dataclasses.replace(SMALL, lora_rank=0, llm_lora_rank=0),
                       data.tokenizer_texts(rows))
    for part, tokenizer, name in ((model.siglip, None, "siglip"),
                                  (model.llm, model.llm_tokenizer, "gemma")):
        part.save_pretrained(tmp_path / name)
        if tokenizer:
            tokenizer.save_pretrained(tmp_path / name)
    text = main(monkeypatch, "--data", odd, "--encoder", tmp_path / "siglip",
                "--llm", tmp_path / "gemma", "--steps", 2, "--batch-size", 4,
                "--out", tmp_path / "h", "--workers", 0, "--device", "cpu")
    assert "LoRA and new layers" in text and "has no tokenizer" in text
    config = json.loads((tmp_path / "h" / "config.json").read_text())
    assert config["preset"] == "paper" and config["n_queries"] == 64
    assert len(log_of(tmp_path / "h")) == 2


@pytest.mark.parametrize("flags, words", [
    (("--data", "nowhere"), "no such file"), (("--objectives", "sx"), "letters of s, c, g, d"),
    (("--steps", "0"), "--steps 0: expected"), (("--init", "nowhere"), "not a run folder"),
    (("--lambda", "nan"), "--lambda nan: expected"), (("--lr", "1e9"), "--lr"),
    (("--augment", "50"), "--augment"), (("--seed", "-5"), "--seed"),
    (("--workers", "-1"), "--workers"), (("--lr", "inf"), "--lr"),
    (("--init", "x", "--llm", "y"), "leave out"), (("--colour", "red"), "unrecognized"),
    (("--device", "tpu9"), "tpu9"),
    (("--preset", "paper", "--encoder", "nowhere"), "nowhere")])
def test_bad_flags_get_one_line(phantom, tmp_path, monkeypatch, capsys, flags, words):
    """Guards: a traceback, or a run that starts on something else than was asked for."""
    command = ["--data", phantom, *FAST, "--out", tmp_path / "i", "--steps", 1]
    with pytest.raises((InputError, SystemExit)) as error:
        main(monkeypatch, *command, *flags)
    assert words in str(error.value) + capsys.readouterr().err
    assert "\n" not in str(error.value)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("script, flags, model", [
    ("train.py", (), "google/siglip2-so400m-patch16-512"),
    ("retrieve.py", ("--checkpoint", "google/siglip2-base-patch16-224"), "google/siglip2-base"),
    ("icl_ground.py", ("--lvlm", "google/medgemma-1.5-4b-it", "--k", "0"),
     "google/medgemma-1.5-4b-it")])
def test_without_a_hub_there_is_one_line(phantom, tmp_path, script, flags, model):
    """Guards: two minutes of retries, each a line, where weights cannot be downloaded."""
    done = subprocess.run([sys.executable, ROOT / script, "--data", phantom, *flags], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and not any(tmp_path.iterdir())
    [line] = done.stderr.splitlines()
    assert model in line and "hf auth login" in line


def test_an_unreadable_training_image_stops_or_is_counted(phantom, tmp_path, monkeypatch):
    """Guards: an image silently replaced by noise; a run that dies without the path."""
    folder = tmp_path / "data"
    shutil.copytree(phantom, folder)
    bad = folder / "images" / "train_00003.png"
    bad.write_bytes(bad.read_bytes()[:200])
    command = ["train.py", "--data", folder, *FAST, "--steps", 5, "--objectives", "s",
               "--out", tmp_path / "j"]
    assert "train_00003.png" in run(*command, "--workers", 2, ok=False)
    shutil.rmtree(tmp_path / "j")
    text = main(monkeypatch, *command[1:], "--skip-bad-images")
    assert "skipped unreadable images 1 times" in text and "train_00003.png" in text


def test_an_unreadable_image_costs_no_run(phantom, tmp_path, monkeypatch):
    """Guards: a batch without an image that ends the run in spite of --skip-bad-images; a finished
    run whose evaluation is lost to one test image."""
    folder = shutil.copytree(phantom, tmp_path / "data")
    for name in ("train_00003.png", "test_00003.png"):
        (folder / "images" / name).write_bytes(b"no image")
    flags = ["--data", folder, *FAST, "--steps", 40, "--objectives", "c", "--batch-size", 1,
             "--workers", 0, "--skip-bad-images", "--out", tmp_path / "j"]
    with pytest.raises(InputError, match="test_00003.png.*the run is saved.*--resume"):
        main(monkeypatch, *flags)
    assert sum(line["loss"] is None for line in log_of(tmp_path / "j")) == 1
    shutil.copy(phantom / "images" / "test_00003.png", folder / "images")
    main(monkeypatch, *flags, "--resume")
    assert json.loads((tmp_path / "j" / "metrics.json").read_text())["n_images"] == 12


def test_help_is_the_manual(monkeypatch, capsys):
    """Guards: a flag without an explanation, or one that the design names and the parser lacks."""
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
        train.main()
    text = capsys.readouterr().out
    for flag in ("data out preset encoder llm random-init init resume objectives lambda epochs "
                 "steps batch-size lr accumulate grad-checkpoint workers seed device dry-run "
                 "skip-bad-images").split():
        assert f"--{flag}" in text
    assert TINY.preset in text and "Eq. 1" in text


def test_autocast_is_bf16_or_fp16_by_the_gpu(monkeypatch):
    """Guards: fp16 without a scaler on a GPU that has bf16; half precision on a CPU unasked."""
    cuda = torch.device("cuda")
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
        assert train.choose_precision("auto", cuda) == expected
    assert train.choose_precision("auto", torch.device("cpu")) == torch.float32
    assert train.choose_precision("bf16", torch.device("cpu")) == torch.bfloat16
