"""metrics.py against hand values, brute force, double loops, and its real command."""

import itertools
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import metrics

SCRIPT = Path(metrics.__file__)
pytestmark = pytest.mark.filterwarnings("error")                 # a 0 / 0 anywhere fails

LEFT, RIGHT = [0.5, 0.2, 0.9, 0.8], [0.1, 0.2, 0.5, 0.8]
# greedy matching by IoU takes the first pair (.778) and leaves the others without a partner
CHAIN_PREDS = [[.1, 0, .5, .4], [0, 0, .38, .4]]
CHAIN_TARGETS = [[.05, 0, .45, .4], [.2, 0, .6, .4]]


def random_boxes(rng, n):
    """On a coarse grid, so that ties, contact and IoU of exactly 1/2 occur."""
    corner = rng.integers(0, 5, (n, 2))
    return np.concatenate([corner, corner + rng.integers(1, 4, (n, 2))], 1) / 8


def pairings(n, m):
    """Every way to make min(n, m) one-to-one pairs, as (row, column) lists."""
    if n > m:
        return [[(i, j) for j, i in pairs] for pairs in pairings(m, n)]
    return [list(enumerate(cols)) for cols in itertools.permutations(range(m), int(n))]


def row(image="a.png", phrase="heart", boxes=(LEFT,), pred=(LEFT,), malformed=False):
    return {"image": image, "phrase": phrase, "boxes": [list(box) for box in boxes],
            "pred": [list(box) for box in pred], "raw": "", "malformed": malformed}


# ---- retrieval -----------------------------------------------------------------------------------

@pytest.mark.parametrize("n_queries, n_candidates", [(7, 20), (20, 7), (5, 3), (1, 1)])
def test_recall_is_the_double_loop(n_queries, n_candidates):
    """Guards against counting each of an image's texts instead of any, and K larger than C."""
    rng = np.random.default_rng(0)
    queries = [f"image {i}" for i in rng.integers(0, 6, n_queries)]
    candidates = [f"image {i}" for i in rng.integers(0, 6, n_candidates)]
    ranked = np.stack([rng.permutation(n_candidates) for _ in queries])
    values = metrics.recall_at_k(ranked, queries, candidates)
    assert list(values) == ["R@1", "R@5", "R@10", "R@20", "R@40"]
    for k in (1, 5, 10, 20, 40):
        hits = 0
        for query, order in zip(queries, ranked):
            hits += any(candidates[j] == query for j in order[:k])
        assert values[f"R@{k}"] == pytest.approx(hits / n_queries)


def test_recall_by_hand_in_both_directions():
    """Guards against a swap of the directions: several texts an image, and one image a text."""
    texts = ["a", "a", "b"]                                      # the image of each text
    to_text = metrics.recall_at_k([[2, 0, 1], [0, 2, 1]], ["a", "b"], texts, ks=(1, 2))
    to_image = metrics.recall_at_k([[0, 1], [1, 0], [1, 0]], texts, ["a", "b"], ks=(1, 2))
    assert to_text == {"R@1": 0.0, "R@2": 1.0}
    assert to_image == {"R@1": pytest.approx(2 / 3), "R@2": 1.0}


def test_chance_recall_is_the_mean_over_all_orders():
    """Guards: drawing with replacement; m / C for a query with several texts; K larger than C."""
    queries, candidates = ["a", "b", "c", "none"], ["a", "b", "a", "c", "a"]
    orders = list(itertools.permutations(range(5)))
    drawn = [metrics.recall_at_k([order] * 4, queries, candidates, (1, 2, 3, 9))
             for order in orders]
    values = metrics.chance_recall(queries, candidates, (1, 2, 3, 9))
    assert values == {key: pytest.approx(np.mean([one[key] for one in drawn])) for key in drawn[0]}
    one_each = metrics.chance_recall(np.arange(400), np.arange(400))
    assert one_each == {f"R@{k}": pytest.approx(k / 400) for k in (1, 5, 10, 20, 40)}


def test_a_ranking_too_short_is_not_taken_for_a_miss():
    """Guards against a top-10 ranking scored as R@40, and against -1 padding read as the last."""
    for ranked in ([[0]], [[0, -1]]):
        with pytest.raises(AssertionError):
            metrics.recall_at_k(ranked, ["a"], ["a", "b"])


# ---- boxes and matching --------------------------------------------------------------------------

def test_iou_and_giou_by_hand():
    """Guards against xywh read as xyxy, and the hull left out for boxes that do not touch."""
    a, b = [[0, 0, .4, .4], [0, 0, .2, .2]], [[.2, 0, .6, .4], [.4, 0, .6, .2], [0, 0, .4, .4]]
    assert metrics.box_iou(a, b) == pytest.approx(np.array([[1 / 3, 0, 1], [0, 0, .25]]))
    giou = metrics.box_iou(a, b, generalized=True)
    assert giou.shape == (2, 3)
    assert giou[0, [0, 2]] == pytest.approx([1 / 3, 1]) and giou[1, 1] == pytest.approx(-1 / 3)


@pytest.mark.parametrize("boxes", [[[.5, .5, .2, .6]], [[.1, .1, .1, .2]], [[0, 0, np.nan, 1]]])
def test_boxes_without_area_stop_the_program(boxes):
    """Guards against swapped corners or NaN scored as a quiet 0, or as a negative area."""
    with pytest.raises(AssertionError, match="expected x0 < x1"):
        metrics.box_iou(boxes, [LEFT])


def test_one_flat_box_is_not_a_list_of_boxes():
    """Guards against n_pred 4 and one box: [x0, y0, x1, y1] given where a list of boxes belongs."""
    with pytest.raises(ValueError):
        metrics.precision_recall_f1([LEFT], [[LEFT]])


def test_hungarian_is_brute_force():
    """Guards against an assignment that is only nearly optimal, or wrong for N > M or no rows."""
    rng = np.random.default_rng(0)
    for case in range(300):
        n, m = rng.integers(0, 5, 2)
        cost = rng.normal(size=(n, m)) if case % 2 else rng.integers(-2, 3, (n, m))
        rows, cols = metrics.hungarian(cost)
        assert len(set(rows)) == len(set(cols)) == len(rows) == min(n, m)
        best = min(sum(cost[i, j] for i, j in pairs) for pairs in pairings(n, m))
        assert sum(cost[rows, cols]) == pytest.approx(best)


def count_matches(pred, target):
    return metrics.precision_recall_f1([pred], [target])["TP"]


def test_the_match_count_is_brute_force_in_any_order():
    """Guards against greedy matching, whose count can be too small and depends on the order."""
    rng = np.random.default_rng(1)
    for _ in range(150):
        target = random_boxes(rng, rng.integers(0, 5))
        pred = np.concatenate([target[:2], random_boxes(rng, rng.integers(0, 3))])
        hit = metrics.box_iou(pred, target) >= 0.5
        best = max(sum(hit[i, j] for i, j in pairs) for pairs in pairings(*hit.shape))
        assert count_matches(pred, target) == best
        assert count_matches(rng.permutation(pred), rng.permutation(target)) == best
    assert count_matches(CHAIN_PREDS, CHAIN_TARGETS) == 2


def test_an_iou_of_one_half_is_a_match():
    """Guards against rounding: .1 + .2 style corners must not decide a hit at exactly 0.5."""
    for shift in np.arange(0, 0.5, 0.01):
        whole, half = [shift, .1, shift + .4, .5], [shift, .1, shift + .4, .3]
        assert count_matches([whole], [half]) == 1


# ---- grounding -----------------------------------------------------------------------------------

def test_precision_recall_f1_by_hand():
    """Guards against macro averages over queries, and one prediction counted for two targets."""
    preds = [[LEFT], [LEFT, RIGHT], [], [LEFT, LEFT], []]
    targets = [[LEFT], [RIGHT], [LEFT, RIGHT], [LEFT], []]       # TP 1, 1, 0, 1, 0
    values = metrics.precision_recall_f1(preds, targets)
    assert values == {"F@0.5": pytest.approx(0.6), "P@0.5": pytest.approx(3 / 5),
                      "R@0.5": pytest.approx(3 / 5), "TP": 3, "n_pred": 5, "n_gt": 5}
    values = metrics.precision_recall_f1([[LEFT, RIGHT, [0, 0, .1, .1]]], [[LEFT]])
    assert (values["P@0.5"], values["R@0.5"], values["F@0.5"]) == pytest.approx((1 / 3, 1, 1 / 2))


def test_threshold_is_used_and_named():
    """Guards against a threshold that changes the value but not its name, or neither."""
    third = [[0, 0, .4, .4]], [[.2, 0, .6, .4]]
    assert metrics.precision_recall_f1([third[0]], [third[1]])["F@0.5"] == 0
    assert metrics.precision_recall_f1([third[0]], [third[1]], threshold=0.3)["F@0.3"] == 1


def test_the_printed_row_of_table_2():
    """Guards against another pooling: TP 376, n_pred 1447, n_gt 1521 print as 25.34 25.98 24.72."""
    preds, targets = [[LEFT]] * 1447 + [[]] * 74, [[LEFT]] * 376 + [[RIGHT]] * 1145
    values = metrics.precision_recall_f1(preds, targets)
    assert (values["TP"], values["n_pred"], values["n_gt"]) == (376, 1447, 1521)
    assert [f"{100 * values[key]:.2f}" for key in ("F@0.5", "P@0.5", "R@0.5")] \
        == ["25.34", "25.98", "24.72"]


def test_robust_detection_outcome_worked_values():
    """Guards against the distance in units of the wrong box, and greedy pairs (p1, g0 first)."""
    one = metrics.robust_detection_outcome([[[.10, .10, .50, .50]]], [[[.20, .10, .60, .30]]])
    assert one == {"Ro/L": pytest.approx(.805245, abs=1e-6), "Ro/S": pytest.approx(.5)}
    preds = [[0, 0, .4, .4], [.35, 0, .75, .4]]
    targets = [[.2, 0, .6, .4], [.5, .1, .9, .5], [.1, .6, .3, .9]]
    two = metrics.robust_detection_outcome([preds], [targets])
    assert two == {"Ro/L": pytest.approx(.569854, abs=1e-6), "Ro/S": pytest.approx(2 / 3)}


def test_robust_detection_outcome_is_brute_force():
    """Guards against a mean of query means: pairs and misses are pooled over the whole set."""
    rng, loc, shape, most = np.random.default_rng(2), 0.0, 0.0, 0
    preds = [random_boxes(rng, rng.integers(0, 4)) * rng.uniform(.9, 1) for _ in range(60)]
    targets = [random_boxes(rng, rng.integers(0, 4)) for _ in range(60)]
    for pred, target in zip(preds, targets):
        most += max(len(pred), len(target))
        giou = metrics.box_iou(pred, target, generalized=True)
        for i, j in max(pairings(*giou.shape), key=lambda pairs: sum(giou[i, j] for i, j in pairs)):
            (a, b, c, d), (e, f, g, h) = pred[i], target[j]
            dx, dy = ((a + c) - (e + g)) / 2 / (g - e), ((b + d) - (f + h)) / 2 / (h - f)
            loc += 2 ** -(dx * dx + dy * dy)
            inter = min(c - a, g - e) * min(d - b, h - f)
            shape += inter / ((c - a) * (d - b) + (g - e) * (h - f) - inter)
    assert metrics.robust_detection_outcome(preds, targets) == {
        "Ro/L": pytest.approx(loc / most), "Ro/S": pytest.approx(shape / most)}


def test_mean_iou_by_hand():
    """Guards against rewarding extra boxes, and against counting queries empty on both sides."""
    assert metrics.mean_iou([CHAIN_PREDS], [CHAIN_TARGETS]) == pytest.approx((.6 + .33 / .45) / 2)
    assert metrics.mean_iou([[[0, 0, .4, .4]], []], [[[.2, 0, .6, .4]], []]) == pytest.approx(1 / 3)
    assert metrics.mean_iou([[LEFT, RIGHT], []], [[LEFT], [LEFT]]) == pytest.approx(.25)


@pytest.mark.parametrize("boxes, pred", [((), ()), ((LEFT,), ()), ((), (LEFT,))])
def test_empty_sides_score_zero(boxes, pred):
    """Guards against NaN and warnings where nothing is predicted or nothing is to be found."""
    values = metrics.grounding_metrics([row(boxes=boxes, pred=pred)])
    assert [values[key] for key in (*metrics.PERCENT, "mIoU")] == [0.0] * 6
    assert (values["n_pred"], values["n_gt"]) == (len(pred), len(boxes))


def test_grounding_metrics_keys_and_types():
    """Guards against a key that drifts from metrics.json, and NumPy numbers that json rejects."""
    values = metrics.grounding_metrics([row(), row(pred=(), malformed=True)])
    assert list(values) == ["Ro/L", "Ro/S", "F@0.5", "P@0.5", "R@0.5", "TP", "n_pred", "n_gt",
                            "n_queries", "n_malformed", "mIoU"]
    assert {key for key, v in values.items() if type(v) is int} \
        == {"TP", "n_pred", "n_gt", "n_queries", "n_malformed"}
    assert values == json.loads(json.dumps(values))
    assert (values["TP"], values["n_queries"], values["n_malformed"]) == (1, 2, 1)
    assert (values["P@0.5"], values["R@0.5"], values["mIoU"]) == (1.0, 0.5, 0.5)


# ---- bootstrap -----------------------------------------------------------------------------------

def test_bootstrap_resamples_images():
    """Guards against resampling rows: an image's phrases are hit or missed together here."""
    rows = [row(f"{i}.png", f"phrase {j}", pred=(LEFT if i % 2 else RIGHT,))
            for i in range(20) for j in range(25)]
    low, high = metrics.bootstrap(rows)["R@0.5"]
    assert low <= 0.3 and high >= 0.7                            # rows: about .46 to .54
    alone = metrics.bootstrap([row(pred=(LEFT if j % 2 else RIGHT,)) for j in range(9)])
    assert alone["R@0.5"] == pytest.approx((4 / 9, 4 / 9))       # one image: nothing to resample


def test_bootstrap_is_the_metric_of_the_resampled_rows():
    """Guards against a second, different code path under the intervals, and an unseeded draw."""
    rng = np.random.default_rng(3)
    rows = [row(f"{i // 3}.png", boxes=random_boxes(rng, rng.integers(0, 3)).tolist(),
                pred=random_boxes(rng, rng.integers(0, 3)).tolist()) for i in range(60)]
    intervals = metrics.bootstrap(rows, n=15, seed=5)
    assert intervals == metrics.bootstrap(rows, n=15, seed=5)
    assert intervals != metrics.bootstrap(rows, n=15, seed=6)
    images, draws = sorted({r["image"] for r in rows}), np.random.default_rng(5)
    values = []
    for _ in range(15):
        drawn = [images[i] for i in draws.integers(len(images), size=len(images))]
        values.append(metrics.grounding_metrics([r for name in drawn for r in rows
                                                 if r["image"] == name]))
    point = metrics.grounding_metrics(rows)
    for key, (low, high) in intervals.items():
        assert (low, high) == pytest.approx(np.percentile([v[key] for v in values], [2.5, 97.5]))
        assert low < point[key] < high


# ---- the phrase prior ----------------------------------------------------------------------------

def test_prior_by_hand():
    """Guards against the mean for the median, and against one box for a phrase that has two."""
    heart = [[.1, .5, .5, .9], [.2, .5, .6, .9], [.6, .5, .9, .9]]
    rows = [{"regions": [{"phrase": "heart", "boxes": [box]}]} for box in heart]
    rows += [{"regions": [{"phrase": "lungs", "boxes": [LEFT, RIGHT]}]},    # either order
             {"regions": [{"phrase": "lungs", "boxes": [RIGHT, LEFT]}]}, {}, {"regions": None}]
    predict = metrics.phrase_prior(rows)
    assert predict("heart") == [[.2, .5, .6, .9]]
    assert predict("lungs") == [RIGHT, LEFT]
    unseen = np.median(heart + [LEFT, RIGHT, LEFT, RIGHT], axis=0)
    assert len(predict("unseen")) == 1 and predict("unseen")[0] == pytest.approx(unseen)
    predict("heart")[0][0] = 7.0
    assert predict("heart") == [[.2, .5, .6, .9]]                # the caller's copy


@pytest.mark.parametrize("counts, expected", [
    ([1, 1, 2], 1), ([1, 2], 2), ([1, 2, 3], 2), ([0, 0, 1], 1)])
def test_prior_predicts_the_usual_number_of_boxes(counts, expected):
    """Guards against a rank that few occurrences have, which would cost precision; never none."""
    boxes = [[.1, .1, .2, .2], [.4, .4, .5, .5], [.7, .7, .8, .8]]
    rows = [{"regions": [{"phrase": "nodules", "boxes": boxes[:n]}]} for n in counts]
    assert metrics.phrase_prior(rows)("nodules") == [pytest.approx(box) for box in boxes[:expected]]


def test_prior_without_boxes_is_one_clear_error():
    """Guards against a median of nothing, reported later and elsewhere as NaN boxes."""
    for rows in ([], [{"report": "Normal."}], [{"regions": [{"phrase": "a", "boxes": []}]}]):
        with pytest.raises(ValueError, match="got no box"):
            metrics.phrase_prior(rows)


# ---- the predictions file and the command --------------------------------------------------------

def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The script with these arguments, in tmp_path -> (stdout, stderr); or it raises SystemExit."""
    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr()
    return run


def test_read_predictions_returns_the_rows(tmp_path):
    """Guards against lost rows, and against lines split at a separator inside a phrase."""
    rows = [row(phrase="caf\u00e9 \u2028 line"), row(boxes=(), pred=())]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    assert metrics.read_predictions(path) == rows
    short = {key: value for key, value in row().items() if key not in ("raw", "malformed")}
    assert metrics.read_predictions(write(path, [short])) == [short | {"malformed": False}]


@pytest.mark.parametrize("change, found", [
    ({"pred": [[10, 20, 300, 400]]}, r"\[10, 20, 300, 400\]"),              # pixels
    ({"pred": [[.5, .5, .2, .2]]}, r"\[0.5, 0.5, 0.2, 0.2\]"),              # x, y, w, h
    ({"boxes": [[.1, .1, .1, .2]]}, "the box"),                       # no area
    ({"boxes": [[.1, .1, .2]]}, "the box"),
    ({"boxes": [.1, .1, .2, .2]}, "the box 0.1"),                     # a list too few
    ({"pred": [[.1, .1, .2, float("nan")]]}, "nan"),
    ({"pred": [[.1, .1, float("inf"), .2]]}, "inf"),
    ({"pred": [[0, 0, 1, True]]}, "True"),
    ({"pred": [["0", "0", "1", "1"]]}, "the box"),
    ({"pred": None}, "image, phrase, boxes and pred .*NoneType"),
])
def test_a_wrong_row_is_named(tmp_path, change, found):
    """Guards against boxes in another format scored as misses, and errors without file and line."""
    path = write(tmp_path / "p.jsonl", [row(), row() | change])
    with pytest.raises(ValueError, match=r"p\.jsonl:2: .*expected") as error:
        metrics.read_predictions(path)
    assert error.match(found) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("", "is empty"),
    (json.dumps(row()) + "\n" + json.dumps(row())[:50], ":2: expected a JSON object .*JSONDecode"),
    (json.dumps(row())[:50] + "\n" + json.dumps(row()), ":1: expected a JSON object .*JSONDecode"),
    ("[1, 2]\n", ":1: expected a JSON object"),
    ('{"image": "a.png"}\n', ":1: expected a JSON object with .*'?phrase"),
])
def test_a_damaged_file_is_named(tmp_path, text, message):
    """Guards against a run killed while writing: scored without its last query, or a traceback."""
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        metrics.read_predictions(path)


def test_a_box_of_almost_no_area_is_not_counted(tmp_path):
    """Guards: a box of 1e-9 counted as a prediction."""
    path = write(tmp_path / "p.jsonl", [row(pred=(LEFT, [.1, .1, .1 + 1e-9, .5]))])
    assert metrics.read_predictions(path) == [row(pred=(LEFT,))]


def test_scripts_score_with_the_named_functions(monkeypatch, tmp_path, capsys):
    """Guards: a second copy of a formula: the functions that the README names are not the ones
    that the command and the bootstrap run."""
    path = write(tmp_path / "p.jsonl", [row(f"{i}.png") for i in range(3)])
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(path), "--bootstrap", "20"])

    def printed():
        metrics.main()
        return capsys.readouterr().out
    assert "100.00 [100.00, 100.00]" in printed()
    monkeypatch.setattr(metrics, "ratio", lambda values, counts, weights=None: (
        0.5 if weights is None else np.full(len(weights), 0.5)))
    assert printed().count("50.00 [50.00, 50.00]") == len(metrics.PERCENT)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(path), "--bootstrap", "0"])
    for name in ("precision_recall_f1", "robust_detection_outcome"):
        with monkeypatch.context() as patch:
            named = getattr(metrics, name)
            patch.setattr(metrics, name, lambda *args, **options: dict.fromkeys(
                named(*args, **options), 0.25))
            assert "25.00" in printed(), name
    monkeypatch.setattr(metrics, "mean_iou", lambda *_: 0.125)
    assert "mIoU 12.50%" in printed()


def test_command_prints_the_table_and_writes_json(run, tmp_path):
    """Guards against a table and a JSON file that disagree, and left-over temporary files."""
    rows = [row(f"{i}.png", pred=(LEFT if i % 4 else RIGHT,)) for i in range(16)]
    write(tmp_path / "lofi.jsonl", rows)
    out, err = run("lofi.jsonl", "--json", "out.json", "--bootstrap", 100)
    header, line = out.splitlines()[:2]
    assert err == "" and "malformed replies: 0 of 16 (lofi.jsonl)\n" in out
    assert header.split() == ["Model", "Ro/L", "Ro/S", "F@0.5", "P@0.5", "R@0.5"]
    low, high = metrics.bootstrap(rows, 100)["F@0.5"]
    assert line.startswith("lofi.jsonl ") and f"75.00 [{100 * low:.2f}, {100 * high:.2f}]" in line
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["grounding"] == metrics.grounding_metrics(rows)
    assert written["intervals"]["F@0.5"] == [low, high]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lofi.jsonl", "out.json"]


def test_command_with_several_files(run, tmp_path):
    """Guards against models mixed up, and files of one name merged."""
    for folder, pred in (("one", LEFT), ("two", RIGHT)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "p.jsonl", [row(f"{i}.png", pred=(pred,)) for i in range(5)])
    out, _ = run("one/p.jsonl", "two/p.jsonl", "--bootstrap", 0, "--json", "o.json")
    scores = json.loads((tmp_path / "o.json").read_text())
    assert {name: score["grounding"]["F@0.5"] for name, score in scores.items()} \
        == {"one/p.jsonl": 1.0, "two/p.jsonl": 0.0}
    lines = [line.split() for line in out.splitlines()[1:3]]
    assert [(line[0], line[3]) for line in lines] == [("one/p.jsonl", "100.00"),
                                                      ("two/p.jsonl", "0.00")]
    assert "[" not in out


def test_malformed_replies_stand_under_the_table():
    """Guards: a model that mostly answers with something else, whose table does not say so; the
    prior, which has no replies, counted among them."""
    answers = [row(f"{i}.png", malformed=i < 3, pred=()) for i in range(1200)]
    scores = {"grounding": metrics.grounding_metrics(answers)}
    table = metrics.grounding_table({"lofi": scores, "other": scores, "phrase prior": scores})
    assert table.splitlines()[-1] == "malformed replies: 3 of 1,200 (lofi), 3 of 1,200 (other)"
    assert metrics.grounding_table({"phrase prior": scores}).endswith("malformed replies: none")


@pytest.mark.parametrize("arguments", [
    ("none.jsonl",), ("bad.jsonl",), ("good.jsonl", "cut.jsonl"),
    ("good.jsonl", "--json", "."), ("good.jsonl", "--json", "good.jsonl"), (".",),
    ("good.jsonl", "--bootstrap", "-1")])
def test_user_mistakes_are_one_line(run, tmp_path, capsys, arguments):
    """Guards against tracebacks, exit status 0, half-written results and overwritten input."""
    write(tmp_path / "good.jsonl", [row()])
    write(tmp_path / "bad.jsonl", [row(pred=([1, 2, 3, 4],))])
    (tmp_path / "cut.jsonl").write_text(json.dumps(row())[:-9])
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    json_flag = () if "--json" in arguments else ("--json", "o.json")
    with pytest.raises(SystemExit) as end:
        run(*arguments, *json_flag)
    assert end.value.code.startswith("metrics.py: ") and "\n" not in end.value.code
    assert capsys.readouterr().out == ""
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_auroc_is_the_share_of_ordered_pairs():
    """Guards: ties counted whole; classes swapped; scores by plain loops over all pairs."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        scores, labels = rng.integers(0, 6, 30) / 5, rng.random(30) < 0.4
        pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
        assert metrics.auroc(scores, labels) == pytest.approx(np.mean(pairs))
    assert metrics.auroc([.9, .4, .4], [1, 1, 0]) == 0.75
    assert math.isnan(metrics.auroc([1.0, 2.0], [True, True]))
