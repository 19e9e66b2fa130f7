"""Scores: retrieval (Table 1) and phrase grounding (Section 3.2, Tables 2 to 4).

    python metrics.py PREDICTIONS [...] [--json PATH] [--bootstrap N]

prints a row for each predictions file, in percent, each value with its 95 % interval over images,
such as 73.49 [70.12, 76.63]. A file has one query, an image and a phrase, on each line:

    {"image": "images/0001.png", "phrase": "The heart is enlarged.",
     "boxes": [[0.38, 0.51, 0.78, 0.84]], "pred": [[0.40, 0.50, 0.80, 0.85]],
     "raw": "the model's reply", "malformed": false, "similarity": 0.31}

"boxes" are the true boxes, "pred" the predicted ones; either may be []. "raw", "malformed" (the
reply could not be read and counts as no boxes) and "similarity" (cos(E_I(I), E_T(phrase)) minus
that of the empty text) may be missing. icl_ground.py writes such files.

Q queries  C candidates  K cutoff rank  N, M predicted and target boxes of a query
boxes: (x0, y0, x1, y1), fractions of width and height; preds, targets: a list of boxes a query
"""

import argparse
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from data import (InputError, box_iou, box_problem, check_output, check_ranges, drop_degenerate,
                  first_line, format_table, run_command, write_json)

PERCENT = ("Ro/L", "Ro/S", "F@0.5", "P@0.5", "R@0.5")            # the columns of Tables 2 to 4


# ---- retrieval (Table 1) -------------------------------------------------------------------------

def recall_at_k(ranked, query_ids, candidate_ids, ks=(1, 5, 10, 20, 40)):
    """R@K = share of queries with one of their own among the first K candidates (Table 1).
    ranked: (Q, >= min(max(ks), C)) candidate indices, best first; ids: (Q,) and (C,) images."""
    n_queries, n = len(query_ids), len(candidate_ids)
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
    1521 boxes give every R of Tables 2 to 4; k = 40: TP 376, n_pred 1447, so P .2598, R .2472. (But
    Sec. 3.0.1 speaks of 2,404 test pairs.)"""
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

    The boxes of an occurrence are sorted; the r-th answer is the median of all r-th boxes, if it is
    the first or at least half of the phrase's occurrences have as many. An unknown phrase gets the
    median of all boxes. Raises InputError if the rows have no box."""
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


# ==================================================================================================
# The metrics end here. Below: the predictions file and the command.
# ==================================================================================================

def read_predictions(path):
    """Predictions file -> its rows, without boxes of almost no area. Raises InputError."""
    rows, lines = [], Path(path).read_bytes().splitlines() if Path(path).is_file() else []
    if not lines:
        raise InputError(f"{path}: no such file, or it is empty; expected one JSON object on each "
                         "line, as icl_ground.py writes (see --help)")
    for number, line in enumerate(lines, 1):
        try:
            row = {"malformed": False, **json.loads(line)}
            _, _, boxes = row["image"], row["phrase"], row["boxes"] + row["pred"]
        except (ValueError, TypeError, LookupError) as error:
            raise InputError(f"{path}:{number}: expected a JSON object with image, phrase, boxes "
                             f"and pred ({type(error).__name__}: {first_line(error)})")
        for box in boxes:
            if problem := box_problem(box):
                raise InputError(f"{path}:{number}: the box {box!r:.80} {problem}; expected [x0, "
                                 "y0, x1, y1] as fractions of the image's width and height")
        rows.append({**row, "boxes": drop_degenerate(row["boxes"]),
                     "pred": drop_degenerate(row["pred"])})
    return rows


def grounding_table(results):
    """{model: {"grounding": .., "intervals": .. or missing}} -> Tables 2 to 4 as text, and the
    number of malformed replies, which count as no boxes."""
    table, malformed = [("Model", *PERCENT)], []
    for model, result in results.items():
        scores = result["grounding"]
        cells = [f"{100 * scores[key]:.2f}" for key in PERCENT]
        for i, key in enumerate(PERCENT if "intervals" in result else ()):
            cells[i] += " [{:.2f}, {:.2f}]".format(*(100 * end for end in result["intervals"][key]))
        table.append((model, *cells))
        if model != "phrase prior":
            malformed.append(f"{scores['n_malformed']:,} of {scores['n_queries']:,} ({model})")
    return f"{format_table(table)}\nmalformed replies: {', '.join(malformed) or 'none'}"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("predictions", nargs="+", type=Path, metavar="PREDICTIONS", help="a file for each model")
    add("--json", type=Path, metavar="PATH", help="also write the scores there, as fractions")
    add("--bootstrap", type=int, default=1000, metavar="N",
        help="resamples of the images for the 95 %% intervals; 0: none, as in the paper "
        "(default: %(default)s)")
    return parser.parse_args()


def main():
    args, results = parse_args(), {}
    check_ranges(args, {"bootstrap": (0, 1e5)})
    if args.json:
        check_output(args.json, ".json")
    for path in args.predictions:
        rows = read_predictions(path)
        results[str(path)] = {"grounding": grounding_metrics(rows)}
        if args.bootstrap:
            results[str(path)]["intervals"] = bootstrap(rows, args.bootstrap)
    print(grounding_table(results))
    for name, result in results.items():
        print("{}: {TP} of {n_pred} predicted and of {n_gt} true boxes match; mIoU {mIoU:.2%}"
              .format(name, **result["grounding"]))
    if args.json:
        write_json(args.json, results if len(results) > 1 else next(iter(results.values())))


if __name__ == "__main__":
    run_command(main)
