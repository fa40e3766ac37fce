"""Sections and figures of the measures, on hand-made results."""

import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imread
from small_models import relation_score

from hgpt.interpret import measure, report
from hgpt.interpret.drawing import inline_svg, look, measure_against_loss, save_figure, swatch
from hgpt.interpret.measures import MEASURES, planes
from hgpt.interpret.measures.differences import conclusions
from hgpt.interpret.measures.parallelograms import BAEK2025, score_distributions, scores_by_relation
from hgpt.interpret.models import Source
from hgpt.interpret.statistics import Estimate
from hgpt.interpret.subject import AnalysisSettings
from hgpt.interpret.vectors import Projection

RNG = np.random.default_rng(0)
UNKNOWN = Estimate(value=np.nan, low=np.nan, high=np.nan)
POINTS, NAMES = RNG.normal(size=(2, 12, 2)), tuple((f"in{i}", f"out{i}") for i in range(12))


def in_planes(points=POINTS, names=NAMES):
    return names, dict.fromkeys(("relation", "vocabulary"), Projection(*points, 1.0, 0.2, 0.2))


def model(label, scores, *, history=(), checkpoints=()):
    """A softmax model with `scores`, relation → RelationScore."""
    shape = {"effective_rank": 2.0, "participation_ratio": 2.0, "isotropy": 0.5, "mean_cosine": 0.1,
             "norms": {"mean": 1.0}, "explained_variance": [0.5, 0.8, 1.0]}  # fmt: skip
    found = {
        "parallelograms": {BAEK2025: scores} if scores else {},
        "planes": {name: in_planes() for name in scores},
        "geometry": {"input": shape, "centres": shape},
        "training": list(history),
    }
    return measure.ModelResult(source=Source(label=label, folder=label), description="softmax, tied", harmonic=False,
                               exponent=None, parameters=1000, tied=True, vocabulary=frozenset(), found=found,
                               checkpoints=list(checkpoints))  # fmt: skip


def analysis(*models, **rest):
    curves = [curve for one in MEASURES for curve in one.curves]
    return measure.Analysis(settings=AnalysisSettings(bootstrap=200), models=list(models), curves=curves, **rest)


def drawn(found, *names):
    """The figures of some measures."""
    measures = [one for one in MEASURES if one.name in names]
    return {drawing.name: drawing for one in measures for drawing in report.drawings(one.section(found))}


def prose_of_planes(found):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planes, "draw", lambda *rest: measure.Drawing(name="", title="", figure=Figure()))
        return " ".join(block for block in planes.section(found) if isinstance(block, str))


def legend(figure):
    return [entry.get_text() for entry in figure.legends[0].get_texts()]


def test_28_models_look_different_with_lines_alone_and_with_markers_alone():
    looks = [look(index) for index in range(28)]
    assert len({(each["color"], each["linestyle"]) for each in looks}) == 28
    assert len({(each["color"], each["marker"]) for each in looks}) == 28
    assert len({swatch(index) for index in range(28)}) == 28


def test_scores_by_relation_and_their_distributions():
    """An interval is drawn where it is, even beside its value; scores beyond the axis are counted."""
    far = np.concatenate([np.full(3, 5000.0), np.ones(397)])
    scores = {"x": replace(relation_score(1.0), score=Estimate(value=1.0, low=2.0, high=3.0)),
              "y": replace(relation_score(1.5), score=replace(UNKNOWN, value=1.5), sampled=far)}  # fmt: skip
    found = analysis(model("m", scores))
    axes = scores_by_relation(found, ["x", "y"]).figure.axes[0]
    lines = next(c for c in axes.collections if isinstance(c, LineCollection))
    assert [segment[:, 0].tolist() for segment in lines.get_segments()] == [[2.0, 3.0]]
    assert sorted(axes.lines[0].get_xdata()) == [1.0, 1.5]
    assert "At most 0.75% of a curve" in score_distributions(found, ["x", "y"]).caption


def test_a_model_without_usable_relations_is_left_out_and_named():
    found = analysis(model("poor", {}), model("rich", {"x": relation_score(1.0), "y": relation_score(2.0)}))
    figures = drawn(found, "parallelograms", "differences", "planes")
    assert "variants" not in figures
    for name in ("scores_by_relation", "score_cdfs"):
        assert legend(figures[name].figure) == ["rich"]
        assert figures[name].caption.endswith("enough usable pairs: poor.")
    assert "Not drawn: poor." in prose_of_planes(found)
    assert len(figures["plane_of_relation_2"].figure.axes) == len(figures["plane_of_vocabulary_1"].figure.axes) == 1
    # The look belongs to the place in the report, whoever is left out.
    assert figures["scores_by_relation"].figure.axes[0].lines[0].get_color() == look(1)["color"]


def test_models_that_share_no_relation():
    a, b = model("a", {"x": relation_score(1.0)}), model("b", {"y": relation_score(1.0)})
    found = analysis(a, b, model("c", {"x": relation_score(2.0), "y": relation_score(1.0)}))
    figures = drawn(found, "planes")
    assert [drawing.title for drawing in figures.values()] == ["x", "x"]
    assert [axes.get_title().split(" · ")[0] for axes in figures["plane_of_relation_1"].figure.axes] == ["a", "c"]
    assert "Not drawn: b." in prose_of_planes(found)
    test = {"variant": BAEK2025, "relation": "x", "difference": 1.0, "low": 0.0, "high": 2.0, "p": 0.5, "p_holm": 0.5}
    found.compared = {"differences": {"c": [test]}}
    difference = drawn(found, "differences")["variants"]
    assert legend(difference.figure) == ["c minus a"]
    assert "no relation that can be compared with a: b." in difference.caption
    assert drawn(analysis(a, b), "differences") == {}
    many = {f"relation{i}": relation_score(1.0) for i in range(6)}
    caption = prose_of_planes(analysis(*(model(label, many) for label in "abcde")))
    assert "first 4 of 6 relations are drawn. Not drawn: relation4, relation5." in caption
    assert "Not drawn: d, e." in caption and "At most 8 pairs" in caption


def test_labels_cover_neither_one_another_nor_a_point():
    """In a crowd; labels that are markup or formulas are drawn as they are."""
    found = analysis(model("m", {"x": relation_score(1.0)}))
    points = 0.02 * np.random.default_rng(0).normal(size=(2, 12, 2))
    points[:, 0] = -1, 1
    names = (("<b>", "$x$"), *((f"first{i}", f"second{i}") for i in range(11)))
    found.models[0].found["planes"] = {"x": in_planes(points, names)}
    figure = drawn(found, "planes")["plane_of_relation_1"].figure
    renderer, panel = FigureCanvasAgg(figure).get_renderer(), figure.axes[0]
    texts = [text for text in panel.texts if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert {"<b>", "$x$"} <= {text.get_text() for text in texts} and len(texts) < 16  # of 16 some have no place
    ends = np.concatenate([line.get_xydata() for line in panel.lines])
    for number, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:number]) == 0
        assert box.count_contains(panel.transData.transform(ends)) == 0
        assert panel.get_window_extent(renderer).count_contains(box.corners()) == 4


def test_the_same_figure_is_the_same_file_and_has_ids_of_its_own_on_a_page(tmp_path):
    figure = scores_by_relation(analysis(model("a <&", {"x": relation_score(1.0)})), ["x"]).figure
    first, second = (save_figure(figure, tmp_path, name).with_suffix(".svg") for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    inline = [inline_svg(file, 'a "title"') for file in (first, second)]
    patterns = ('id="(.*?)"', r'(?:href="|url\()#(.*?)[")]')
    ids, linked = ([set(re.findall(pattern, svg)) for svg in inline] for pattern in patterns)
    assert linked[0] and not ids[0] & ids[1] and all(a <= b for a, b in zip(linked, ids, strict=True))
    assert inline[0].startswith('<svg role="img" aria-label="a &#34;title&#34;" viewBox="0 0 ')
    assert ">a &lt;&amp;</text>" in inline[0] and "<style" not in inline[0]
    assert inline[0].count("fill: #ffffff") == first.read_text().count("fill: #ffffff") - 1  # the ground


@pytest.mark.parametrize(
    "differences, below_random, sentence",
    [
        ((0.5, -0.5, 0.5), {"first": "x", "other": "y"}, "lower in 1 relations, higher in 2, .* In 2 of these 3 .*"),
        ((0.5, 0.5, -0.5), {"first": "", "other": "xy"}, "lower in 1 relations, higher in 2, .* In 0 of these 3 .*"),
        ((0.5, 0.5, -0.5), {"first": "xy", "other": "z"}, "In 3 of these 3 the lower score is also below that of"),
        ((), {"first": "xyz", "other": "xyz"}, "lower in 0 relations, higher in 0, not significantly different in 3"),
    ],
)
def test_a_lower_score_says_whether_it_shows_the_relation(differences, below_random, sentence):
    """Its lower score counts only if that model's own score is below random pairs."""
    found = analysis(*(
        model(label, {name: replace(relation_score(1.0), p_shuffled=0.001 if name in names else 0.5) for name in "xyz"})
        for label, names in below_random.items()
    ))  # fmt: skip
    tests = [{"variant": BAEK2025, "relation": name, "difference": d, "p_holm": 0.01 if differences else 0.5}
             for name, d in zip("xyz", differences or (1.0,) * 3, strict=True)]  # fmt: skip
    found.compared = {"differences": {"other": tests}}
    text = conclusions(found, found.models[1])[0]
    assert re.search(sentence, text) and "better" not in text
    assert ("not that they form parallelograms" in text) == bool(re.search("In [012] of", text))


def test_curves_come_from_evaluations_or_from_checkpoints():
    history = [{"kind": "eval", "step": s, "loss": 3.0, "x_norm_mean": 2.0} for s in (0, 10, 20)]
    kept = [{"step": s, "hidden_norm": 2.0, "centre_norm": 1.0} for s in (10, 20)]
    found = analysis(model("logs", {}, history=history, checkpoints=kept), model("keeps", {}, checkpoints=kept))
    states, centres = (axes for axes in drawn(found, "training")["over_training"].figure.axes if axes.lines)
    assert "centres" in centres.get_ylabel() and [len(line.get_xdata()) for line in centres.lines] == [2, 2]
    assert "hidden" in states.get_ylabel() and [len(line.get_xdata()) for line in states.lines] == [3, 2]


def test_ten_arms_can_be_told_apart_and_nothing_is_cut_off(tmp_path):
    arms = [f"quickstart-exponent{n}xsqrt_dim" for n in range(1, 11)]
    rows = [
        {"arm": arm, "loss": 4 + 0.1 * i + 0.01 * seed, "measure": i + seed, "other": None, "exponent": 11.3 * (i + 1)}
        for i, arm in enumerate(arms)
        for seed in range(2)
    ]
    rows[0] |= {"exponent": 11.1}  # learned: it differs between seeds
    rows += [{"arm": "softmax", "loss": 4.0, "measure": 0.0, "other": 1.0, "exponent": None}]
    figure = measure_against_loss(rows, {"measure": "measure", "other": "other"}, "11 arms. " * 60)
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 11
    first, second, *_, last = legend(figure)
    assert (first, second, last) == (f"{arms[0]}, n = 11.1 to 11.3", f"{arms[1]}, n = 22.6", "softmax")
    pixels = imread(save_figure(figure, tmp_path, "readability"))[..., :3]
    assert pixels[:, [0, -1]].min() > 0.9 and pixels[[0, -1]].min() > 0.9
    panel = figure.axes[0].get_position()
    assert min(panel.size * figure.get_size_inches()) > 1.5


def test_a_new_measure_is_one_entry(monkeypatch):
    """Its numbers are in the JSON, in the summary, in hgpt.compare's columns and in a section that is escaped."""
    folded = [measure.paragraph("folded"), measure.Table(head=["x"], rows=[("y", [UNKNOWN])])]
    quantity = measure.Quantity("the answer", lambda model: model.found["answer"], "higher", key="answer", axis="a")
    new = measure.Measure(
        name="answer",
        title="The <answer>",
        group="mine",
        rows=lambda model: {"answer": model.found["answer"], "quality": {"answer": np.float32(0.5)}},
        section=lambda found: [measure.bullets(["one", "<two>"]), measure.Details(title="more", blocks=folded)],
        quantities=(quantity,),
    )
    monkeypatch.setattr(report, "MEASURES", (*MEASURES, new))
    first = model("a", {"x": relation_score(1.0)})
    first.found["answer"] = Estimate(value=42.0, low=41.0, high=float("nan"))
    found = analysis(first)
    (entry,) = report._plain(report.to_json(found))["models"]
    assert entry["answer"] == {"value": 42.0, "low": 41.0, "high": None} and entry["quality"] == {"answer": 0.5}
    assert report.summary(found)["mine"] == [("the answer\N{NO-BREAK SPACE}↑", [first.found["answer"]])]
    assert report.readability(first)["answer"] == 42.0
    page = report.page(found, report.page_sections(found), defaultdict(str))
    assert '<section id="answer"><h2>The &lt;answer&gt;</h2>' in page and '<a href="#answer">' in page
    assert "<li>one</li><li>&lt;two&gt;</li>" in page and "<p>folded</p>" in page
    assert re.search('<th>y</th><td class="number"> *–', page)
