"""Scores: retrieval (Table 1) and phrase grounding (Section 3.2, Tables 2 to 4).

    python metrics.py PREDICTIONS [...] [--json PATH] [--bootstrap N] [--by phrase]

prints one row a predictions file, in percent, each value with its 95 % interval over images (here
of the default run of train.py):

    Model  Ro/L                  Ro/S                  F@0.5                 P@0.5         ...
    lofi   93.62 [93.06, 94.14]  78.75 [78.06, 79.46]  60.93 [57.58, 64.31]  60.97 [57.62, 64.37]

A predictions file has one query, that is one (image, phrase), a line (icl_ground.py writes it):

    {"image": "images/0001.png", "phrase": "The heart is enlarged.",
     "boxes": [[0.38, 0.51, 0.78, 0.84]], "pred": [[0.40, 0.50, 0.80, 0.85]],
     "raw": "the model's reply", "malformed": false}

"boxes" are the wanted boxes, "pred" the predicted ones; either may be []. "raw" and "malformed"
(the reply could not be read and counts as no boxes) may be missing.
"""

import argparse
import contextlib
import json
import os
import sys
import uuid
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
        mode = draft.stat().st_mode                              # the umask's, whatever write() sets
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
    for given in map(Path, inputs):
        if path.resolve() == given.resolve() or (
                path.exists() and given.exists() and path.samefile(given)):
            raise InputError(f"{path}: is an input of this command and would be overwritten; "
                             "choose another output path")


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
    """(Q, min(k, C)) bool: has the candidate at this rank the query's own id?"""
    n_queries, n_ranks = len(query_ids), min(k, len(candidate_ids))
    if not n_queries or not n_ranks:
        raise ValueError(f"retrieval wants at least one query and one candidate, found {n_queries} "
                         f"and {len(candidate_ids)}")
    ranked = np.asarray(ranked)[:, :n_ranks]
    assert ranked.shape == (n_queries, n_ranks) and ranked.min() >= 0, f"ranked {ranked.shape}"
    codes = np.unique(np.concatenate([query_ids, candidate_ids]), return_inverse=True)[1]
    return codes[n_queries:][ranked] == codes[:n_queries, None]


def recall_at_k(ranked, query_ids, candidate_ids, ks=(1, 5, 10, 20, 40)):
    """R@K = share of queries with one of their own among the first K candidates (Table 1).

    ranked: (Q, >= min(max(ks), C)) candidate indices, best first; ids: (Q,) and (C,) image names.
    An image with several texts is a hit at its first one. With C < K all candidates are used.
    Queries a, b, candidates b, a, a, ranked [[0, 2, 1], [1, 0, 2]]: R@1 0.0, R@5 1.0."""
    match = top_matches(ranked, query_ids, candidate_ids, max(ks))
    return {f"R@{k}": float(match[:, :k].any(1).mean()) for k in ks}


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
    below = [np.searchsorted(negatives, scores[labels], side) for side in ("left", "right")]
    return float(np.mean(below) / len(negatives))


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
    """List of boxes -> (N, 4) float. Boxes without area are dropped where a reply is read."""
    boxes = np.asarray(boxes, float).reshape(len(boxes), 4)
    assert (boxes[:, :2] < boxes[:, 2:]).all(), f"wanted x0 < x1 and y0 < y1, found {boxes}"
    return boxes


def box_areas(a, b):
    """(N, 4), (M, 4) -> areas of intersection, union and enclosing box, (N, M) each."""
    a, b = as_boxes(a)[:, None], as_boxes(b)[None]                          # (N, 1, 4), (1, M, 4)
    area = lambda low, high: (high[..., 2:] - low[..., :2]).clip(0).prod(-1)
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

    heat: (H, W) a phrase's heat map over the film; inside: pixels whose centre is in a box. Not in
    the paper's tables. NaN where no pixel is inside, or none outside.
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


# ---- one-to-one matching -------------------------------------------------------------------------

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
    return hit[hungarian(-hit.astype(float))].sum()


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


# ---- grounding (Tables 2 to 4): every score is a ratio of sums over queries ----------------------

def query_sums(preds, targets, threshold=0.5):
    """(Q, 8), a query: TP, n_pred, n_gt, loc, shape, max(n_pred, n_gt), its mIoU, 1 if any box."""
    def one(pred, target):
        most = max(len(pred), len(target))
        return (match_count(pred, target, threshold), len(pred), len(target),
                *detection_outcome(pred, target), most,
                matched_iou(pred, target) / max(most, 1), most > 0)
    return np.array([one(*pair) for pair in zip(preds, targets, strict=True)], float).reshape(-1, 8)


def score(sums):
    """Sums over queries, (..., 8) -> {metric: (...)}. All denominators are counts; 0 / 0 is 0."""
    tp, n_pred, n_gt, loc, shape, most, iou, filled = np.moveaxis(sums, -1, 0)
    ratio = lambda total, count: total / np.maximum(count, 1)
    return {"Ro/L": ratio(loc, most), "Ro/S": ratio(shape, most),
            "F@0.5": ratio(2 * tp, n_pred + n_gt), "P@0.5": ratio(tp, n_pred),
            "R@0.5": ratio(tp, n_gt), "TP": tp, "n_pred": n_pred, "n_gt": n_gt,
            "mIoU": ratio(iou, filled)}


def totals(preds, targets, threshold=0.5):
    """The scores of a whole set as Python int (counts) and float, which json can write."""
    values = score(query_sums(preds, targets, threshold).sum(0))
    return {key: int(v) if key in ("TP", "n_pred", "n_gt") else float(v)
            for key, v in values.items()}


def precision_recall_f1(preds, targets, threshold=0.5):
    """P = TP / n_pred, R = TP / n_gt, F = 2 P R / (P + R) = 2 TP / (n_pred + n_gt): micro.

    The printed rows of Tables 2 to 4 agree with sums over one pool of n_gt = 1521 boxes. Ours,
    k=40: TP 376, n_pred 1447, so P .2598, R .2472, F .2534. The keys follow the threshold."""
    values = totals(preds, targets, threshold)
    return {key.replace("@0.5", f"@{threshold:g}"): values[key]
            for key in ("F@0.5", "P@0.5", "R@0.5", "TP", "n_pred", "n_gt")}


def robust_detection_outcome(preds, targets):
    """Ro/L = sum over pairs loc / sum over queries max(n_pred, n_gt); Ro/S with shape (Eq. 5).

    Preds (0, 0, .4, .4), (.35, 0, .75, .4), targets (.2, 0, .6, .4), (.5, .1, .9, .5),
    (.1, .6, .3, .9): Ro/L .569854, Ro/S .666667."""
    values = totals(preds, targets)
    return {key: values[key] for key in ("Ro/L", "Ro/S")}


def mean_iou(preds, targets):
    """mIoU = mean over queries of matched_iou / max(n_pred, n_gt); both empty: left out.

    Not in the paper's tables. One box a side: the plain IoU. The boxes of match_count: .6667."""
    return totals(preds, targets)["mIoU"]


def grounding_metrics(rows):
    """Predictions-file rows -> the "grounding" part of metrics.json: fractions, counts and mIoU."""
    values = totals([row["pred"] for row in rows], [row["boxes"] for row in rows])
    n_malformed = sum(bool(row.get("malformed")) for row in rows)
    counts = {"n_queries": len(rows), "n_malformed": n_malformed, "mIoU": values.pop("mIoU")}
    return values | counts


def bootstrap(rows, n=1000, seed=0):
    """{metric: (low, high)}: percentile 95 % intervals, n resamples of the IMAGES with replacement.

    The phrases of an image share its film and are not independent, so they stay together."""
    images, image_of_row = np.unique([row["image"] for row in rows], return_inverse=True)
    sums, rng = np.zeros((len(images), 8)), np.random.default_rng(seed)
    np.add.at(sums, image_of_row, query_sums([row["pred"] for row in rows],
                                             [row["boxes"] for row in rows]))   # (images, 8)
    draw = lambda: np.bincount(rng.integers(len(images), size=len(images)), minlength=len(images))
    values = score(np.stack([draw() @ sums for _ in range(n)]))             # {metric: (n,)}
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
    seen = {}                                                    # phrase -> its occurrences
    for region in (region for row in rows for region in row.get("regions") or []):
        seen.setdefault(region["phrase"], []).append(sorted(map(tuple, region["boxes"])))
    every = [box for occurrences in seen.values() for boxes in occurrences for box in boxes]
    if not every:
        raise ValueError('the phrase prior wants training rows with "regions", found no box')
    medians = {phrase: rank_medians(occurrences) for phrase, occurrences in seen.items()}
    typical = [np.median(every, axis=0).tolist()]
    return lambda phrase: [list(box) for box in medians.get(phrase) or typical]


# ---- the predictions file ------------------------------------------------------------------------

def check_row(row, where):
    """One line at the door: keys, types, boxes. where: "file:line", for the ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {row!r:.60}, wanted a JSON object (see --help)")
    row.setdefault("malformed", False)
    for key, kind in dict(image=str, phrase=str, boxes=list, pred=list, malformed=bool).items():
        if not isinstance(row.get(key), kind):
            found = f"{row[key]!r:.60}" if key in row else "nothing"
            raise ValueError(f'{where}: found {found} for "{key}", wanted a {kind.__name__}')
    for box in row["boxes"] + row["pred"]:
        four = isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)
        if not four or not all(-1e-6 <= low < high <= 1 + 1e-6              # NaN fails as well
                               for low, high in (box[::2], box[1::2])):
            raise ValueError(f"{where}: found the box {box!r:.80}, wanted [x0, y0, x1, y1], "
                             "x0 < x1, y0 < y1, as fractions (0 to 1) of width and height")


def read_predictions(path):
    """JSON lines -> checked rows; a wrong line raises ValueError "file:line: found ..."."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file, wanted one that icl_ground.py --out writes")
    rows, lines = [], Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            cut = "; was its writer stopped? Delete the line" if number == len(lines) else ""
            raise ValueError(f"{path}:{number}: found {str(line[:40])[1:]}, wanted a whole JSON "
                             f"object on the line{cut}") from None
        check_row(rows[-1], f"{path}:{number}")
    if not rows:
        raise ValueError(f"{path}: found an empty file, wanted one JSON object a line (see --help)")
    return rows


# ---- command line --------------------------------------------------------------------------------

def format_table(results):
    """{model: {"grounding": .., "intervals": ..}} -> rows of Tables 2 to 4, percent [low, high]."""
    def cell(result, key):
        low_high = ", ".join(f"{100 * x:.2f}" for x in result.get("intervals", {}).get(key, ()))
        return f"{100 * result['grounding'][key]:.2f}" + (f" [{low_high}]" if low_high else "")
    table = [("Model", *PERCENT)]
    table += [(model, *(cell(result, key) for key in PERCENT)) for model, result in results.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def format_phrases(rows, least=5, n=10):
    """The n worst and n best phrases by mIoU, of those with boxes in at least `least` queries."""
    groups = {}
    for row in rows:
        if row["boxes"] or row["pred"]:
            groups.setdefault(row["phrase"], []).append(row)
    scores = {phrase: grounding_metrics(group) for phrase, group in groups.items()
              if len(group) >= least}
    order = sorted(scores, key=lambda phrase: scores[phrase]["mIoU"])
    def line(phrase):
        miou, f, count = (scores[phrase][key] for key in ("mIoU", "F@0.5", "n_queries"))
        return f"{100 * miou:6.2f}  {100 * f:6.2f}  {count:7}  {phrase}"
    return "\n".join([f"{len(order)} of {len(groups)} phrases occur at least {least} times",
                      "  mIoU   F@0.5  queries  worst first", *map(line, order[:n]),
                      "  mIoU   F@0.5  queries  best first", *map(line, order[n:][:-n - 1:-1])])


def main():
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
        raise ValueError(f"--bootstrap: found {args.bootstrap}, wanted a number of resamples, or 0")
    if args.json and (not args.json.parent.is_dir() or args.json.is_dir()
                      or args.json.resolve() in [path.resolve() for path in args.predictions]):
        raise ValueError(f"--json: found {args.json}, wanted another file, in a folder that exists")
    stems = [path.stem for path in args.predictions]
    models = stems if len(set(stems)) == len(stems) else map(str, args.predictions)
    files = {model: read_predictions(path) for model, path in zip(models, args.predictions)}

    results = {model: {"grounding": grounding_metrics(rows)} for model, rows in files.items()}
    for model in files if args.bootstrap else ():
        results[model]["intervals"] = bootstrap(files[model], args.bootstrap)
    print(format_table(results), end="\n\n")
    for model, rows in files.items():
        print("{}: {n_queries} queries, {n_malformed} malformed; {TP} of {n_pred} predicted boxes "
              "match, {n_gt} wanted; mIoU {mIoU:.2%}".format(model, **results[model]["grounding"]))
        if args.by:
            print(format_phrases(rows), end="\n\n")
    if args.json:
        part = args.json.with_name(args.json.name + ".tmp")      # renamed when it is whole
        written = results if len(results) > 1 else results[model]
        part.write_text(json.dumps(written, indent=2) + "\n")
        os.replace(part, args.json)
    print("next: python", "icl_ground.py --image IMAGE --phrase PHRASE" if args.by
          else f"metrics.py {args.predictions[0]} --by phrase")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"metrics.py: {error}")
