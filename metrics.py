"""Scores: retrieval (Table 1) and phrase grounding (Section 3.2, Tables 2 to 4).

    python metrics.py PREDICTIONS [...] [--json PATH] [--bootstrap N] [--by phrase]

prints one row for each predictions file, in percent, each value with its 95 % interval over
images. An example, of the default run of train.py:

    Model                  Ro/L                  Ro/S                 F@0.5                 P@0.5
    lofi   93.62 [93.06, 94.14]  78.75 [78.06, 79.46]  60.93 [57.58, 64.31]  60.97 [57.62, 64.37]

A predictions file has one query, an image and a phrase, on each line (icl_ground.py writes it):

    {"image": "images/0001.png", "phrase": "The heart is enlarged.",
     "boxes": [[0.38, 0.51, 0.78, 0.84]], "pred": [[0.40, 0.50, 0.80, 0.85]],
     "raw": "the model's reply", "malformed": false, "score": 0.93}

"boxes" are the true boxes, "pred" the predicted ones; either may be []. These may be missing:
"raw", "malformed" (the reply could not be read and counts as no boxes) and "score" (how sure the
model is, from 0 to 1).
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
import uuid
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:                                              # Windows: files are not locked
    fcntl = None

# Q queries  C candidates  K cutoff rank  N, M predicted and target boxes of a query
# boxes: (x0, y0, x1, y1), fractions of width and height; preds, targets: a list of boxes a query

PERCENT = ("Ro/L", "Ro/S", "F@0.5", "P@0.5", "R@0.5")            # the columns of Tables 2 to 4


# ---- errors, files and tables: shared by all scripts ---------------------------------------------

class InputError(ValueError):
    """Invalid input. The message is one line: what was given, what is expected, what to do."""


def first_line(error):
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_file(path, write):
    """Write a file atomically: write(draft), then rename the draft to path; make missing folders.

    Raises InputError if it cannot be written; a file that was there is then unchanged."""
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


def check_output(path, inputs):
    """Raise InputError if an output path is one of the inputs, directly or through a link."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    if path.exists() and any(Path(given).exists() and path.samefile(given) for given in inputs):
        raise InputError(f"{path}: is an input of this command and would be overwritten; choose "
                         "another output path")


def lock(path):
    """Open a file to append and lock it -> the open file; the lock ends with its process.

    Raises InputError if another process holds the lock."""
    file = open(path, "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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

def top_matches(ranked, query_ids, candidate_ids, k):
    """(Q, min(k, C)) bool: does the candidate at this rank have the query's own id?"""
    n_queries, n_ranks = len(query_ids), min(k, len(candidate_ids))
    if not n_queries or not n_ranks:
        raise InputError("retrieval expects at least one query and one candidate, got "
                         f"{n_queries} and {len(candidate_ids)}")
    ranked = np.asarray(ranked)[:, :n_ranks]
    assert ranked.shape == (n_queries, n_ranks) and ranked.min() >= 0, f"ranked {ranked.shape}"
    return np.asarray(candidate_ids)[ranked] == np.asarray(query_ids)[:, None]


def recall_at_k(ranked, query_ids, candidate_ids, ks=(1, 5, 10, 20, 40)):
    """R@K = share of queries with one of their own among the first K candidates (Table 1).

    ranked: (Q, >= min(max(ks), C)) candidate indices, best first; ids: (Q,) and (C,) image names.
    An image with several texts is a hit at its first one. With C < K all candidates are used.
    Queries a, b, candidates b, a, a, ranked [[0, 2, 1], [1, 0, 2]]: R@1 0.0, R@5 1.0."""
    match = top_matches(ranked, query_ids, candidate_ids, max(ks))
    return {f"R@{k}": float(match[:, :k].any(1).mean()) for k in ks}


def chance_recall(query_ids, candidate_ids, ks=(1, 5, 10, 20, 40)):
    """The expected R@K of candidates in random order, the row "chance" beside Table 1.

    A query that owns m of C candidates misses with all of its first K with probability
    (C-m)/C * (C-m-1)/(C-1) * ..., K factors. Query a, candidates a, a, b: R@1 2/3, R@2 1."""
    n = len(candidate_ids)
    n_own = Counter(candidate_ids)
    own = np.array([n_own[query] for query in query_ids])[:, None]          # (Q, 1)
    left = n - np.arange(min(max(ks), n))                                   # (K,) not yet drawn
    miss = np.cumprod((1 - own / left).clip(0), axis=1)                     # (Q, K)
    return {f"R@{k}": float(1 - miss[:, min(k, n) - 1].mean()) for k in ks}


def precision_at_k(ranked, query_labels, candidate_labels, ks=(1, 2, 5, 10)):
    """P@K = mean share of the first min(K, C) candidates in the query's category.

    Retrieval by category, not in the paper's tables. Shapes as above.
    Query a, candidates a, b, a, ranked [[0, 1, 2]]: P@1 1.0, P@2 0.5, P@5 2/3."""
    match = top_matches(ranked, query_labels, candidate_labels, max(ks))
    return {f"P@{k}": float(match[:, :k].mean()) for k in ks}


def auroc(scores, labels):
    """P(a positive scores above a negative), ties half. scores: (N,), labels: (N,) bool.

    Zero-shot classification, not in the paper's tables. Scores .9, .4, .4 of labels 1, 1, 0: 0.75.
    NaN where a class is empty."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    negatives = np.sort(scores[~labels])
    if not labels.any() or not len(negatives):
        return float("nan")
    below = np.searchsorted(negatives, scores[labels], "left")
    below_or_equal = np.searchsorted(negatives, scores[labels], "right")
    return float((below + below_or_equal).mean() / 2 / len(negatives))


# ---- boxes ---------------------------------------------------------------------------------------

def box_problem(box):
    """What is invalid about a box [x0, y0, x1, y1] of fractions, in words; None if it is valid."""
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)):
        return "is not a list of 4 numbers"
    x0, y0, x1, y1 = box
    if not all(abs(v) < np.inf for v in box):                    # NaN compares as False
        return "has a value that is not finite"
    if max(box) > 2:
        return "looks like pixels: divide x by the image's width and y by its height"
    if x1 <= x0 or y1 <= y0:
        return "has x1 <= x0 or y1 <= y0: corners are expected, not x, y, width, height"
    if min(box) < -1e-6 or max(box) > 1 + 1e-6:
        return "leaves the image: clip it to [0, 1]"
    return None


def drop_degenerate(boxes):
    """Boxes without those narrower or lower than a millionth of the image, whose area is 0."""
    return [box for box in boxes if box[2] - box[0] >= 1e-6 and box[3] - box[1] >= 1e-6]


def as_boxes(boxes):
    """List of boxes -> (N, 4) float. They are checked where a file is read, and asserted here."""
    boxes = np.asarray(boxes, float).reshape(len(boxes), 4)
    assert (boxes[:, :2] < boxes[:, 2:]).all(), f"expected x0 < x1 and y0 < y1, got {boxes}"
    return boxes


def area(low, high):
    """Area between the corners (x0, y0) of low and (x1, y1) of high; 0 if they are swapped."""
    return (high[..., 2:] - low[..., :2]).clip(0).prod(-1)


def box_areas(a, b):
    """(N, 4), (M, 4) -> areas of intersection, union and enclosing box, (N, M) each."""
    a, b = as_boxes(a)[:, None], as_boxes(b)[None]                          # (N, 1, 4), (1, M, 4)
    inter = area(np.maximum(a, b), np.minimum(a, b))                        # (N, M)
    hull = area(np.minimum(a, b), np.maximum(a, b))                         # (N, M)
    return inter, area(a, a) + area(b, b) - inter, hull


def box_iou(a, b):
    """IoU = intersection / union. (N, 4), (M, 4) -> (N, M), in [0, 1].

    (0, 0, .4, .4) and (.2, 0, .6, .4): .08 / .24 = 1/3."""
    inter, union, _ = box_areas(a, b)
    return inter / union


def box_giou(a, b):
    """GIoU = IoU - (hull - union) / hull (Rezatofighi et al. 2019). -> (N, M), in (-1, 1].

    (0, 0, .2, .2) and (.4, 0, .6, .2): 0 - (.12 - .08) / .12 = -1/3."""
    inter, union, hull = box_areas(a, b)
    return inter / union - (hull - union) / hull


def contrast_to_noise_ratio(heat, boxes):
    """CNR = |mean inside - mean outside| / sqrt(var inside + var outside) (Boecking et al. 2022).

    heat: (H, W) a phrase's heat map over the image; inside: pixels whose centre is in a box. Not
    in the paper's tables. NaN where no pixel is inside, or none outside.
    [[1, 1], [1, 5]] and the lower half: |3 - 1| / sqrt(4 + 0) = 1."""
    heat = np.asarray(heat, float)
    y, x = ((np.arange(n) + 0.5) / n for n in heat.shape)
    inside = np.zeros(heat.shape, bool)
    for x0, y0, x1, y1 in boxes:
        inside |= ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))
    if inside.all() or not inside.any():
        return float("nan")
    a, b = heat[inside], heat[~inside]
    noise = np.sqrt(a.var() + b.var())
    return float(abs(a.mean() - b.mean()) / noise) if noise else 0.0


# ---- one-to-one matching of a query's boxes ------------------------------------------------------

def hungarian(cost):
    """Exact assignment: the min(N, M) one-to-one pairs of least total cost. Returns (rows, cols).

    Hungarian algorithm, O(n^3): rows join one at a time along a shortest augmenting path; the
    potentials u, v keep cost - u - v >= 0, and 0 on the pairs chosen. cost: (N, M), finite.
    [[1, 2], [1, 9]]: rows [0, 1], cols [1, 0], cost 3 (the best single pair first: 10)."""
    cost = np.asarray(cost, float)
    n, m = cost.shape
    if n > m:
        cols, rows = hungarian(cost.T)
        return np.sort(rows), cols[np.argsort(rows)]
    cost = np.pad(cost, ((0, 0), (0, 1)))                        # column m holds the row to place
    u, v, owner = np.zeros(n), np.zeros(m + 1), np.full(m + 1, -1)   # owner: a column's row, or -1
    for row in range(n):
        owner[m], j = row, m
        free, before = np.ones(m + 1, bool), np.full(m + 1, m)   # before: previous column on path
        distance = np.full(m + 1, np.inf)
        while owner[j] >= 0:                                     # until a column without a row
            free[j] = False
            slack = cost[owner[j]] - u[owner[j]] - v
            nearer = free & (slack < distance)
            distance[nearer], before[nearer] = slack[nearer], j
            j = int(np.argmin(np.where(free, distance, np.inf)))
            step = distance[j]
            u[owner[~free]] += step
            v[~free] -= step
            distance[free] -= step
        while j != m:                                            # move the rows along the path
            owner[j], j = owner[before[j]], before[j]
    return np.arange(n), np.argsort(owner[:m])[m - n:]           # columns without a row sort first


def match_count(pred, target, threshold=0.5):
    """TP of one query: the most one-to-one pairs with IoU >= threshold, whatever the order.

    The rule is *not stated in the paper*. Greedy matching by IoU finds 1 where this finds 2: preds
    (.1, 0, .5, .4), (0, 0, .38, .4), targets (.05, 0, .45, .4), (.2, 0, .6, .4)."""
    hit = box_iou(pred, target) >= threshold - 1e-9              # an exact 1/2 survives rounding
    return int(hit[hungarian(-hit.astype(float))].sum())


def matched_iou(pred, target):
    """Largest IoU sum over one-to-one pairs of one query. The boxes above: .6 + .7333."""
    iou = box_iou(pred, target)
    return iou[hungarian(-iou)].sum()


def detection_outcome(pred, target):
    """Sums of loc and shape over the pairs of one query (RoDeO: Meissen et al. 2024, Eq. 2 and 3).

    loc   = 2^(-d^2), d = distance of the centres in units of the target's width and height
    shape = IoU of the two boxes moved to the same centre
    Pairs: Hungarian on -GIoU, no threshold: min(N, M) pairs, overlapping or not.
    pred (.10, .10, .50, .50), target (.20, .10, .60, .30): loc .805245, shape .5."""
    rows, cols = hungarian(-box_giou(pred, target))
    p, g = as_boxes(pred)[rows], as_boxes(target)[cols]                     # (pairs, 4) each
    p_size, g_size = p[:, 2:] - p[:, :2], g[:, 2:] - g[:, :2]               # (pairs, 2) each
    d = (p[:, :2] + p[:, 2:] - g[:, :2] - g[:, 2:]) / 2 / g_size            # (pairs, 2)
    inter = np.minimum(p_size, g_size).prod(1)
    shape = inter / (p_size.prod(1) + g_size.prod(1) - inter)
    return (2 ** -(d ** 2).sum(1)).sum(), shape.sum()


# ---- grounding (Tables 2 to 4): each score is a ratio of two sums over the queries ---------------

def total(values, weights=None):
    """Sum of values (Q,) over the queries -> scalar. With weights (n, Q), how often each of n
    resamples drew a query -> (n,)."""
    return sum(values) if weights is None else weights @ np.asarray(values, float)


def ratio(value, count):
    """value / count; 0 where nothing is counted, as then nothing is summed either."""
    return value / np.maximum(count, 1)


def larger_counts(preds, targets):
    """max(n_pred, n_gt) of each query: a missing box costs as much as one too many."""
    return [max(len(pred), len(target)) for pred, target in zip(preds, targets, strict=True)]


def precision_recall_f1(preds, targets, threshold=0.5, weights=None):
    """P = TP / n_pred, R = TP / n_gt, F = 2 P R / (P + R) = 2 TP / (n_pred + n_gt): micro.

    The printed rows of Tables 2 to 4 agree with sums over one pool of n_gt = 1521 boxes. Ours,
    k=40: TP 376, n_pred 1447, so P .2598, R .2472, F .2534. The keys follow the threshold.
    weights: of the bootstrap (see total)."""
    tp = total([match_count(*pair, threshold) for pair in zip(preds, targets, strict=True)],
               weights)
    n_pred = total([len(pred) for pred in preds], weights)
    n_gt = total([len(target) for target in targets], weights)
    return {f"F@{threshold:g}": ratio(2 * tp, n_pred + n_gt), f"P@{threshold:g}": ratio(tp, n_pred),
            f"R@{threshold:g}": ratio(tp, n_gt), "TP": tp, "n_pred": n_pred, "n_gt": n_gt}


def robust_detection_outcome(preds, targets, weights=None):
    """Ro/L = sum over pairs loc / sum over queries max(n_pred, n_gt); Ro/S with shape (Eq. 5).

    Preds (0, 0, .4, .4), (.35, 0, .75, .4), targets (.2, 0, .6, .4), (.5, .1, .9, .5),
    (.1, .6, .3, .9): Ro/L .569854, Ro/S .666667."""
    most = total(larger_counts(preds, targets), weights)
    sums = np.array([detection_outcome(*pair) for pair in zip(preds, targets)]).reshape(-1, 2)
    loc, shape = total(sums[:, 0], weights), total(sums[:, 1], weights)
    return {"Ro/L": ratio(loc, most), "Ro/S": ratio(shape, most)}


def mean_iou(preds, targets, weights=None):
    """mIoU = mean over queries of matched_iou / max(n_pred, n_gt); both empty: left out.

    Not in the paper's tables. One box a side: the plain IoU. The boxes of match_count: .6667."""
    most = np.array(larger_counts(preds, targets))
    iou = np.array([matched_iou(*pair) for pair in zip(preds, targets)])
    return ratio(total(iou / np.maximum(most, 1), weights), total(most > 0, weights))


def grounding_metrics(rows, weights=None):
    """Predictions-file rows -> the "grounding" part of metrics.json: fractions, counts and mIoU.

    weights: of the bootstrap (see total); each score is then (n,)."""
    preds, targets = [row["pred"] for row in rows], [row["boxes"] for row in rows]
    return {**robust_detection_outcome(preds, targets, weights),
            **precision_recall_f1(preds, targets, weights=weights),
            "n_queries": len(rows), "n_malformed": sum(bool(row.get("malformed")) for row in rows),
            "mIoU": mean_iou(preds, targets, weights)}


def bootstrap(rows, n=1000, seed=0):
    """{metric: (low, high)}: percentile 95 % intervals, n resamples of the IMAGES with replacement.

    The phrases of an image share its pixels and are not independent, so they stay together."""
    images, image_of_row = np.unique([row["image"] for row in rows], return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(images), size=len(images)) for _ in range(n)]
    times_drawn = np.stack([np.bincount(draw, minlength=len(images)) for draw in draws])
    values = grounding_metrics(rows, times_drawn[:, image_of_row])          # {metric: (n,)}
    return {key: tuple(np.percentile(values[key], [2.5, 97.5]).tolist())
            for key in (*PERCENT, "mIoU")}


# ---- the phrase prior: one constant answer per phrase, the baseline beside every grounding score -

def rank_medians(occurrences):
    """A phrase's occurrences, each a sorted list of boxes -> the median box of each rank.

    Rank r is kept while at least half of the occurrences have more than r boxes; rank 0 always."""
    medians = []
    for r in range(max(map(len, occurrences))):
        boxes = [boxes[r] for boxes in occurrences if len(boxes) > r]
        if r == 0 or 2 * len(boxes) >= len(occurrences):
            medians.append(np.median(boxes, axis=0).tolist())
    return medians


def phrase_prior(rows):
    """Manifest rows (the training split) -> function phrase -> boxes, blind to the image.

    A phrase seen: its median box (of several boxes, sorted by x0, y0, x1, y1, one per rank). Not
    seen: the one median box of all. Boxes at x0 .1, .2, .4 and x1 .6, .7, .9: x0 .2, x1 .7."""
    occurrences = defaultdict(list)                              # phrase -> its lists of boxes
    for row in rows:
        for region in row.get("regions") or []:
            occurrences[region["phrase"]].append(sorted(map(tuple, region["boxes"])))
    every = [box for lists in occurrences.values() for boxes in lists for box in boxes]
    if not every:
        raise InputError('the phrase prior expects training rows with "regions", got no box')
    medians = {phrase: rank_medians(lists) for phrase, lists in occurrences.items()}
    typical = [np.median(every, axis=0).tolist()]

    def predict(phrase):
        return [list(box) for box in medians.get(phrase) or typical]
    return predict


# ---- the predictions file ------------------------------------------------------------------------

def row_problem(row):
    """What is invalid about a row of a predictions file, in words; None if it is valid."""
    if not isinstance(row, dict):
        return f"got {row!r:.60}, expected a JSON object (see --help)"
    kinds = {"image": str, "phrase": str, "boxes": list, "pred": list, "malformed": bool}
    for key, kind in kinds.items():
        if not isinstance(row.get(key), kind):
            got = f"{row[key]!r:.60}" if key in row else "nothing"
            return f'got {got} for "{key}", expected a {kind.__name__}'
    if type(row.get("score")) not in (int, float, type(None)):
        return f'got {row["score"]!r:.60} for "score", expected a number'
    for box in row["boxes"] + row["pred"]:
        if problem := box_problem(box):
            return (f"the box {box!r:.80} {problem}; expected [x0, y0, x1, y1] as fractions of the "
                    "image's width and height")
    return None


def read_predictions(path):
    """Predictions file -> its rows, checked. Raises InputError "file:line: ..." for the first
    invalid line; boxes of almost no area are dropped."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, expected one that icl_ground.py --out writes")
    rows, lines = [], Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            cut = "; was its writer stopped? Delete the line" if number == len(lines) else ""
            raise InputError(f"{path}:{number}: got {str(line[:40])[1:]}, expected a whole JSON "
                             f"object on the line{cut}") from None
        if isinstance(row, dict):
            row.setdefault("malformed", False)
        if problem := row_problem(row):
            raise InputError(f"{path}:{number}: {problem}")
        rows.append({**row, "boxes": drop_degenerate(row["boxes"]),
                     "pred": drop_degenerate(row["pred"])})
    if not rows:
        raise InputError(f"{path}: is empty, expected one JSON object on each line (see --help)")
    return rows


# ---- command line --------------------------------------------------------------------------------

def grounding_table(results):
    """{model: {"grounding": .., "intervals": ..}} -> Tables 2 to 4 as text, percent [low, high].

    "intervals" may be missing."""
    def cell(result, key):
        value = f"{100 * result['grounding'][key]:.2f}"
        if "intervals" not in result:
            return value
        low, high = result["intervals"][key]
        return f"{value} [{100 * low:.2f}, {100 * high:.2f}]"
    return format_table([("Model", *PERCENT), *(
        (model, *(cell(result, key) for key in PERCENT)) for model, result in results.items())])


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
        table = table[:n] + [("...", "", "", "")] + table[-n:]
    return (f"{len(scores)} of {len(groups)} phrases occur at least {least} times; worst first\n"
            + format_table([("phrase", "mIoU", "F@0.5", "queries"), *table]))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("predictions", nargs="+", type=Path, metavar="PREDICTIONS",
        help="predictions files, a query a line as above; the file's name is the model's")
    add("--json", type=Path, metavar="PATH",
        help='also write {"grounding": {..}, "intervals": {..}} there, as fractions, under each '
             "model's name if there are several files (default: not written)")
    add("--bootstrap", type=int, default=1000, metavar="N",
        help="resamples of the images for the 95 %% intervals, seed 0; 0 prints none (default: "
             "%(default)s; not stated in the paper, which prints no intervals)")
    add("--by", choices=["phrase"],
        help="also list the ten worst and ten best phrases by mIoU, of those that occur at least "
             "five times (default: not listed; not in the paper)")
    args = parser.parse_args()
    if args.bootstrap < 0:
        parser.error(f"--bootstrap: got {args.bootstrap}, expected a number of resamples, or 0")
    return args


def main():
    args = parse_args()
    if args.json:
        check_output(args.json, args.predictions)
    names = [path.stem for path in args.predictions]
    if len(set(names)) < len(names):                             # one/p.jsonl two/p.jsonl
        names = [str(path) for path in args.predictions]
    files = {name: read_predictions(path) for name, path in zip(names, args.predictions)}

    results = {}
    for name, rows in files.items():
        results[name] = {"grounding": grounding_metrics(rows)}
        if args.bootstrap:
            results[name]["intervals"] = bootstrap(rows, args.bootstrap)

    print(grounding_table(results), end="\n\n")
    for name, rows in files.items():
        print("{}: {n_queries} queries, {n_malformed} malformed; {TP} of {n_pred} predicted and of "
              "{n_gt} true boxes match; mIoU {mIoU:.2%}".format(name, **results[name]["grounding"]))
        if args.by:
            print(phrase_table(rows), end="\n\n")
    if args.json:
        write_json(args.json, results if len(results) > 1 else results[names[0]])
    if not args.by:
        print(f"Next: python metrics.py {shlex.quote(str(args.predictions[0]))} --by phrase")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"metrics.py: {first_line(error)}")
