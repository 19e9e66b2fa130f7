"""Scores: retrieval (Table 1) and phrase grounding (Section 3.2, Tables 2 to 4).

    python metrics.py PREDICTIONS [...] [--json PATH] [--bootstrap N] [--by phrase]

prints a row for each predictions file, in percent, each value with its 95 % interval over images,
such as 73.49 [70.12, 76.63]. A file has one query, an image and a phrase, on each line:

    {"image": "images/0001.png", "phrase": "The heart is enlarged.",
     "boxes": [[0.38, 0.51, 0.78, 0.84]], "pred": [[0.40, 0.50, 0.80, 0.85]],
     "raw": "the model's reply", "malformed": false, "score": 0.93}

"boxes" are the true boxes, "pred" the predicted ones; either may be []. "raw", "malformed" (the
reply could not be read and counts as no boxes) and "score" (how sure the model is, 0 to 1) may be
missing. icl_ground.py writes such files.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import pickle
import re
import shlex
import struct
import sys
import uuid
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

# Q queries  C candidates  K cutoff rank  N, M predicted and target boxes of a query
# boxes: (x0, y0, x1, y1), fractions of width and height; preds, targets: a list of boxes a query

PERCENT = ("Ro/L", "Ro/S", "F@0.5", "P@0.5", "R@0.5")            # the columns of Tables 2 to 4


# ---- errors, files and tables: shared by all scripts ---------------------------------------------

class InputError(ValueError):
    """Invalid input. The message is one line: what was given, what is expected, what to do."""


# What reading a damaged or foreign file may raise, apart from InputError.
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
           ArithmeticError, AssertionError, ImportError, pickle.UnpicklingError, csv.Error,
           struct.error, zlib.error, zipfile.BadZipFile)


def first_line(error):
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_command(main, *args, interrupted="interrupted"):
    """Run a script's main; an error that a user can fix ends it with one line, exit status 1."""
    name = Path(sys.argv[0]).name
    if "" in sys.argv[1:]:
        sys.exit(f"{name}: an argument is empty; is a variable of the shell not set?")
    for arg in sys.argv[1:]:
        if (text := arg.encode(errors="replace").decode()) != arg:
            sys.exit(f"{name}: {text}: an argument is not valid UTF-8")
    try:
        main(*args)
    except (InputError, OSError) as error:
        sys.exit(f"{name}: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {interrupted}")
    except (RuntimeError, MemoryError) as error:    # torch on a CPU raises a plain RuntimeError
        if "DataLoader worker" in str(error):
            sys.exit(f"{name}: {first_line(error)} If memory ran out, lower --workers or "
                     "--batch-size; train.py --resume continues")
        if not (isinstance(error, MemoryError)
                or re.search("out of memory|allocate memory", str(error))):
            raise
        sys.exit(f"{name}: out of memory; lower --batch-size; train.py also has --accumulate and "
                 "--grad-checkpoint, icl_ground.py --k, metrics.py --bootstrap")


def write_file(path, write):
    """Write a file atomically, and its folders: write(draft), then rename the draft to path.
    Raises InputError; a file that was there is then unchanged."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        mode = draft.stat().st_mode                              # the umask's; write() may differ
        write(draft)
        draft.chmod(mode)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:                     # torch.save raises RuntimeError
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be written ({reason}); make room or choose another path, "
                         "then run the same command again")
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file atomically. Raises InputError."""
    write_file(path, lambda draft: draft.write_text(json.dumps(value, indent=2) + "\n"))


def check_output(path, suffix, inputs):
    """Raise InputError if an output path is a folder, is one of the inputs, directly or through a
    link, is a file of settings, or has another suffix."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    if path.exists() and any(os.path.exists(file) and path.samefile(file) for file in inputs):
        raise InputError(f"{path}: is an input of this command and would be overwritten; choose "
                         "another output path")
    if path.name == "prepare.json" or path.name.endswith(".settings.json"):
        raise InputError(f"{path}: a set or predictions need this file; choose another output path")
    if path.suffix != suffix:
        raise InputError(f"{path}: expected a {suffix} file to write")


def check_ranges(args, ranges):
    """Raise InputError unless flags are in their ranges, {name in args: (low, high)}."""
    for name, (low, high) in ranges.items():
        flag = "lambda" if name == "lam" else name.replace("_", "-")
        values = getattr(args, name, None)                       # None: not given, or no such flag
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= high:   # NaN compares as False
                most = "or more" if high == np.inf else f"to {high:,.10g}"
                raise InputError(f"--{flag} {value}: expected {low:g} {most}")


def lock(path):
    """Open a file to append and lock it, until the process ends. Raises InputError if another
    process holds the lock."""
    file = open(path, "a")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:                                          # Windows: files are not locked
        pass
    except BlockingIOError:
        file.close()
        raise InputError(f"{path}: another process is writing this file; wait for it to end, or "
                         "choose another --out")
    return file


def format_table(rows):
    """Rows of text, the header first -> aligned lines: first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                     for row in rows)


# ---- retrieval (Table 1) -------------------------------------------------------------------------

def recall_at_k(ranked, query_ids, candidate_ids, ks=(1, 5, 10, 20, 40)):
    """R@K = share of queries with one of their own among the first K candidates (Table 1).
    ranked: (Q, >= min(max(ks), C)) candidate indices, best first; ids: (Q,) and (C,) images."""
    n_queries, n = len(query_ids), len(candidate_ids)
    if not n_queries or not n:
        raise InputError(f"got {n_queries} queries and {n} candidates, expected at least one query "
                         "and one candidate")
    ranked = np.asarray(ranked)[:, :max(ks)]
    assert ranked.shape == (n_queries, min(max(ks), n)) and ranked.min() >= 0, ranked.shape
    own = np.asarray(candidate_ids)[ranked] == np.asarray(query_ids)[:, None]   # (Q, n_ranks)
    return {f"R@{k}": float(own[:, :k].any(1).mean()) for k in ks}


def chance_recall(query_ids, candidate_ids, ks=(1, 5, 10, 20, 40)):
    """The expected R@K of candidates in random order: a query that owns m of C misses K times with
    probability (C-m)/C * (C-m-1)/(C-1) * .. (K factors). Query a of a, a, b: R@1 2/3, R@2 1."""
    n, n_own = len(candidate_ids), Counter(candidate_ids)
    own = np.array([n_own[query] for query in query_ids])[:, None]          # (Q, 1)
    left = n - np.arange(min(max(ks), n))                                   # (K,) not yet drawn
    miss = np.cumprod((1 - own / left).clip(0), axis=1)                     # (Q, K)
    return {f"R@{k}": float(1 - miss[:, min(k, n) - 1].mean()) for k in ks}


def auroc(scores, labels):
    """P(a positive scores above a negative), ties half; NaN without both. Not in the paper.
    scores: (N,), labels: (N,) bool. Scores .9, .4, .4 of labels 1, 1, 0: 0.75."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    positives, negatives = scores[labels], np.sort(scores[~labels])
    if not len(positives) or not len(negatives):
        return float("nan")
    below, not_above = (np.searchsorted(negatives, positives, side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(negatives))


# ---- boxes and grounding (Tables 2 to 4) ---------------------------------------------------------

def box_problem(box):
    """An error message for an invalid box, expected [x0, y0, x1, y1] in fractions; else None."""
    if not (isinstance(box, list) and len(box) == 4
            and all(type(v) in (int, float) and abs(v) < np.inf for v in box)):  # nor NaN
        return "is not a list of 4 numbers, or has one that is not finite"
    if max(box) > 2:
        return "looks like pixels: divide x by the image's width and y by its height"
    if box[2] <= box[0] or box[3] <= box[1]:
        return "has x1 <= x0 or y1 <= y0: corners are expected, not x, y, width, height"
    if min(box) < -1e-6 or max(box) > 1 + 1e-6:
        return "leaves the image: clip it to [0, 1]"


def drop_degenerate(boxes):
    """Remove boxes narrower or lower than a millionth of the image, whose area is 0."""
    return [box for box in boxes if box[2] - box[0] >= 1e-6 and box[3] - box[1] >= 1e-6]


def box_iou(a, b, generalized=False):
    """IoU = intersection / union. (N, 4), (M, 4) -> (N, M), in [0, 1].
    generalized: GIoU = IoU - (hull - union) / hull, in (-1, 1], with the enclosing box as hull
    (Rezatofighi et al. 2019). (0, 0, .2, .2), (.4, 0, .6, .2): 0 - (.12 - .08) / .12 = -1/3."""
    a, b = np.asarray(a, float).reshape(len(a), 1, 4), np.asarray(b, float).reshape(1, len(b), 4)
    for box in (a, b):                                           # checked where a file is read
        assert (box[..., :2] < box[..., 2:]).all(), f"expected x0 < x1 and y0 < y1, got {box}"
    low, high = np.minimum(a, b), np.maximum(a, b)                          # (N, M, 4)
    inter = (low[..., 2:] - high[..., :2]).clip(0).prod(-1)                 # (N, M)
    union = sum((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)) - inter
    hull = (high[..., 2:] - low[..., :2]).prod(-1)
    iou = inter / union
    return iou - (hull - union) / hull if generalized else iou


def hungarian(cost):
    """The min(N, M) one-to-one pairs of least total cost, by shortest augmenting paths.
    cost: (N, M), finite -> (rows, cols). [[1, 2], [1, 9]]: [0, 1], [1, 0]; greedy would cost 10."""
    cost = np.asarray(cost, float)
    n_rows, n_cols = cost.shape
    if n_rows > n_cols:
        cols, rows = hungarian(cost.T)
        return np.sort(rows), cols[np.argsort(rows)]
    col_of_row = np.zeros(0, int)                                # of the rows assigned so far
    for row in range(n_rows):
        # Bellman-Ford: the cheapest path from the new row to each column. A path may pass an
        # assigned row: it enters by that row's column, which it frees, and leaves to another one.
        path_cost, last_row = cost[row].copy(), np.full(n_cols, row)
        for _ in range(row):
            enter = path_cost[col_of_row] - cost[range(row), col_of_row]    # (row,)
            through = enter[:, None] + cost[:row]                           # (row, n_cols)
            better = through.min(0) < path_cost - 1e-12
            path_cost[better] = through.min(0)[better]
            last_row[better] = through.argmin(0)[better]
        free = np.setdiff1d(np.arange(n_cols), col_of_row)
        col = free[path_cost[free].argmin()]
        while last_row[col] < row:                               # back along the path, reassigning
            col_of_row[last_row[col]], col = col, col_of_row[last_row[col]]
        col_of_row = np.append(col_of_row, col)
    return np.arange(n_rows), col_of_row


def ratio(values, counts, weights=None):
    """Each score: sum(values) / sum(counts) over the queries, (Q,) each; 0 where none is counted.
    weights (n, Q): how often each of n resamples drew a query (see bootstrap) -> (n,) ratios."""
    weights = np.ones(len(values)) if weights is None else weights
    return weights @ values / np.maximum(weights @ counts, 1)


def precision_recall_f1(preds, targets, threshold=0.5, weights=None):
    """P = TP / n_pred, R = TP / n_gt, F = 2 P R / (P + R) = 2 TP / (n_pred + n_gt): micro.

    TP of a query: the most one-to-one pairs with IoU >= threshold, *not stated in the paper*; the
    best pair first, and so on, can be fewer. Micro is inferred: whole numbers of TP out of n_gt =
    1521 boxes give every R of Tables 2 to 4; k = 40: TP 376, n_pred 1447, so P .2598, R .2472."""
    tp = np.zeros(len(preds), int)
    for i, (pred, target) in enumerate(zip(preds, targets, strict=True)):
        hit = box_iou(pred, target) >= threshold - 1e-9          # an IoU of exactly 1/2 counts
        tp[i] = hit[hungarian(-hit.astype(float))].sum()
    n_pred, n_gt = (np.array([*map(len, boxes)]) for boxes in (preds, targets))
    return {f"F@{threshold:g}": ratio(2 * tp, n_pred + n_gt, weights),
            f"P@{threshold:g}": ratio(tp, n_pred, weights),
            f"R@{threshold:g}": ratio(tp, n_gt, weights),
            "TP": int(tp.sum()), "n_pred": int(n_pred.sum()), "n_gt": int(n_gt.sum())}


def robust_detection_outcome(preds, targets, weights=None):
    """Ro/L = sum over all pairs loc / sum over queries max(n_pred, n_gt); Ro/S with shape.

    loc   = 2^(-d^2), d = distance of the centres in units of the target's width and height
    shape = IoU of the two boxes moved to the same centre
    Pairs: Hungarian on -GIoU, no threshold: min(N, M) a query, overlapping or not.
    RoDeO: Meissen et al. 2024, Eq. 2, 3 and 5."""
    loc, shape, most = [], [], []                                           # (Q,) each
    for pred, target in zip(preds, targets, strict=True):
        rows, cols = hungarian(-box_iou(pred, target, generalized=True))
        p, g = np.reshape(pred, (-1, 4))[rows], np.reshape(target, (-1, 4))[cols]  # (pairs, 4)
        p_size, g_size = p[:, 2:] - p[:, :2], g[:, 2:] - g[:, :2]           # (pairs, 2) each
        d = (p[:, :2] + p[:, 2:] - g[:, :2] - g[:, 2:]) / 2 / g_size        # (pairs, 2)
        inter = np.minimum(p_size, g_size).prod(1)
        loc.append((2 ** -(d ** 2).sum(1)).sum())
        shape.append((inter / (p_size.prod(1) + g_size.prod(1) - inter)).sum())
        most.append(max(len(pred), len(target)))
    return {"Ro/L": ratio(loc, most, weights), "Ro/S": ratio(shape, most, weights)}


def mean_iou(preds, targets, weights=None):
    """mIoU = mean over queries of the largest IoU sum of one-to-one pairs / max(n_pred, n_gt);
    queries with neither are left out. Not in the paper."""
    tables = [box_iou(*pair) for pair in zip(preds, targets, strict=True)]  # (N, M) of each query
    sums = np.array([iou[hungarian(-iou)].sum() for iou in tables])
    most = np.array([max(iou.shape) for iou in tables])
    return ratio(sums / np.maximum(most, 1), most > 0, weights)


def grounding_metrics(rows, weights=None):
    """Predictions-file rows -> the "grounding" part of metrics.json: fractions, counts and mIoU."""
    preds, targets = [row["pred"] for row in rows], [row["boxes"] for row in rows]
    return {**robust_detection_outcome(preds, targets, weights),
            **precision_recall_f1(preds, targets, weights=weights),
            "n_queries": len(rows), "n_malformed": sum(bool(row.get("malformed")) for row in rows),
            "mIoU": mean_iou(preds, targets, weights)}


def bootstrap(rows, n=1000, seed=0):
    """{metric: (low, high)}: percentile 95 % intervals, n resamples of the IMAGES with replacement:
    the phrases of an image share its pixels and are not independent, so they stay together."""
    images, image_of_row = np.unique([row["image"] for row in rows], return_inverse=True)
    rng, i = np.random.default_rng(seed), len(images)
    times_drawn = np.stack([np.bincount(rng.integers(i, size=i), minlength=i) for _ in range(n)])
    values = grounding_metrics(rows, times_drawn[:, image_of_row])          # {metric: (n,)}
    return {key: tuple(np.percentile(values[key], [2.5, 97.5]).tolist())
            for key in (*PERCENT, "mIoU")}


def phrase_prior(rows):
    """A grounder that never sees the image: phrase -> its median box in the training rows.

    The boxes of an occurrence are sorted; the r-th answer is the median of all r-th boxes, if at
    least half of the phrase's occurrences have that many. An unknown phrase gets the median of all
    boxes. Raises InputError if the rows have no box."""
    box_lists = defaultdict(list)                                # phrase -> sorted boxes of each
    for row in rows:
        for region in row.get("regions") or []:
            box_lists[region["phrase"]].append(sorted(region["boxes"]))
    all_boxes = [box for lists in box_lists.values() for boxes in lists for box in boxes]
    if not all_boxes:
        raise InputError('the phrase prior expects training rows with "regions", got no box')
    unknown, medians = [np.median(all_boxes, axis=0).tolist()], {}
    for phrase, lists in box_lists.items():
        n_boxes = max(1, sorted(map(len, lists))[len(lists) // 2])          # half have as many
        ranks = list(itertools.zip_longest(*lists))[:n_boxes]               # the r-th box of each
        medians[phrase] = [np.median([*filter(None, rank)], axis=0).tolist() for rank in ranks]
    return lambda phrase: [list(box) for box in medians.get(phrase) or unknown]


# ---- the predictions file and the command --------------------------------------------------------

def row_problem(row):
    """An error message for an invalid row of a predictions file, else None."""
    kinds = {"image": [str], "phrase": [str], "boxes": [list], "pred": [list],
             "malformed": [bool, type(None)], "score": [float, int, type(None)]}
    for key, types in kinds.items():
        if type(row.get(key)) not in types:
            got = f"{row[key]!r:.60}" if key in row else "nothing"
            return f'got {got} for "{key}", expected a {types[0].__name__}'
    for box in row["boxes"] + row["pred"]:
        if problem := box_problem(box):
            return (f"the box {box!r:.80} {problem}; expected [x0, y0, x1, y1] as fractions of the "
                    "image's width and height")


def read_predictions(path):
    """Predictions file -> its rows, without boxes of almost no area. Raises InputError."""
    rows, lines = [], Path(path).read_bytes().splitlines() if Path(path).is_file() else []
    if not lines:
        raise InputError(f"{path}: no such file, or it is empty; expected one JSON object on each "
                         "line, as icl_ground.py --out writes (see --help)")
    for number, line in enumerate(lines, 1):
        try:
            row = dict(json.loads(line))                         # TypeError: a number, a list, ..
            json.dumps(row, ensure_ascii=False).encode()         # no lone surrogates
        except (ValueError, TypeError, RecursionError):
            cut = "; if its writer was interrupted, delete the line" if number == len(lines) else ""
            raise InputError(f"{path}:{number}: got {line[:40].decode(errors='replace')}, expected "
                             f"a JSON object on the line{cut}") from None
        if problem := row_problem(row):
            raise InputError(f"{path}:{number}: {problem}")
        rows.append({"malformed": False, **row, "boxes": drop_degenerate(row["boxes"]),
                     "pred": drop_degenerate(row["pred"])})
    return rows


def grounding_table(results):
    """{model: {"grounding": .., "intervals": .. or missing}} -> Tables 2 to 4 as text."""
    table = [("Model", *PERCENT)]
    for model, result in results.items():
        cells = [f"{100 * result['grounding'][key]:.2f}" for key in PERCENT]
        for i, key in enumerate(PERCENT if "intervals" in result else ()):
            cells[i] += " [{:.2f}, {:.2f}]".format(*(100 * end for end in result["intervals"][key]))
        table.append((model, *cells))
    return format_table(table)


def phrase_table(rows, least=5, n=10):
    """The n worst and n best phrases by mIoU, of those with boxes in at least `least` queries."""
    groups = defaultdict(list)
    for row in rows:
        if row["boxes"] or row["pred"]:
            groups[row["phrase"]].append(row)
    scores = {phrase: grounding_metrics(group) for phrase, group in groups.items()
              if len(group) >= least}
    table = [(phrase, f"{100 * score['mIoU']:.2f}", f"{100 * score['F@0.5']:.2f}",
              str(score["n_queries"]))
             for phrase, score in sorted(scores.items(), key=lambda item: item[1]["mIoU"])]
    if len(table) > 2 * n:
        table[n:-n] = [("...", "", "", "")]
    return (f"{len(scores)} of {len(groups)} phrases occur at least {least} times; worst first\n"
            + format_table([("phrase", "mIoU", "F@0.5", "queries"), *table]))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("predictions", nargs="+", type=Path, metavar="PREDICTIONS", help="a file for each model")
    add("--json", type=Path, metavar="PATH", help="also write the scores there, as fractions")
    add("--bootstrap", type=int, default=1000, metavar="N",
        help="resamples of the images for the 95 %% intervals; 0: none, as in the paper "
        "(default: %(default)s)")
    add("--by", choices=["phrase"], help="also list the ten worst and ten best phrases by mIoU")
    args = parser.parse_args()
    check_ranges(args, {"bootstrap": (0, 1e5)})
    if args.json:
        check_output(args.json, ".json", args.predictions)

    stems = [path.stem for path in args.predictions]
    names = stems if len(set(stems)) == len(stems) else map(str, args.predictions)
    results, notes = {}, []
    for name, path in zip(names, args.predictions):
        rows = read_predictions(path)
        scores = grounding_metrics(rows)
        results[name] = {"grounding": scores}
        if args.bootstrap:
            results[name]["intervals"] = bootstrap(rows, args.bootstrap)
        notes.append("\n{}: {n_queries} queries, {n_malformed} malformed; {TP} of {n_pred} "
                     "predicted and of {n_gt} true boxes match; mIoU {mIoU:.2%}".format(
                         name, **scores))
        if args.by:
            notes.append(phrase_table(rows))
    print(grounding_table(results), *notes, sep="\n")
    if args.json:
        write_json(args.json, results if len(results) > 1 else results[name])
    if not args.by:
        print(f"Next: python metrics.py {shlex.quote(str(args.predictions[0]))} --by phrase")


if __name__ == "__main__":
    run_command(main)
