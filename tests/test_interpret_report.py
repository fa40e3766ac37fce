"""The command from end to end on small models (harmonic, softmax, GPT-2): what it writes, what it refuses."""

import json
import pydoc_data.topics
import re
import resource
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from matplotlib.image import imread
from small_models import TEXT, byte_pairs, encode, export, prepare, relation_set, run_of, unpack
from small_texts import refused
from transformers import GPT2Config, GPT2LMHeadModel

from hgpt.cli import run
from hgpt.data.tokenizer import hf_tokenizer, load_tokenizer
from hgpt.interpret import __main__ as command
from hgpt.interpret.drawing import swatch
from hgpt.interpret.measure import counts_text
from hgpt.interpret.measures import centres, explorer, parallelograms, reading
from hgpt.interpret.measures.differences import comparisons, relations_without_power
from hgpt.interpret.measures.parallelograms import BAEK2025, OF_CENTRES, VARIANTS
from hgpt.interpret.models import find_sources, loaded
from hgpt.interpret.report import READABILITY, analyse, page, page_sections, readability, restricted, write_report
from hgpt.interpret.subject import AnalysisSettings
from hgpt.run.checkpoint import LATEST

main = partial(run, command.main)

VOCAB, CONTEXT = 320, 24
CPU = torch.device("cpu")
LABELS = ["harmonic", "softmax", "gpt2", "foreign"]
VAL = TEXT[:1000]
BACKEND = byte_pairs(VOCAB)
TOKENS = len(encode(BACKEND, VAL)) - 1
WORDS = ["the", "with", "while", "item", "value", "class", "name", "suite", "test", "list"]
PAIRS = [(word, word + "s") for word in WORDS]
FIGURES = {"frequency_bands", "reliability", "scores_by_relation", "score_cdfs", "variants", "plane_of_relation_1",
           "plane_of_vocabulary_1", "explained_variance", "cka", "layers", "over_training"}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A data folder, relations, a run with two checkpoints and a history, and models of every kind."""
    root = tmp_path_factory.mktemp("interpret")
    data = prepare(root / "data", BACKEND, VAL)
    relations = relation_set(root / "relations", PAIRS, "plural")
    relation_set(root / "relations", PAIRS[:3], "tiny")
    (root / "runs").mkdir()
    folder = run_of(root / "runs" / "harmonic", f'path = "{data}"', BACKEND, {10: CONTEXT, 20: CONTEXT}, "harmonic")
    history = [{"kind": "train", "step": 1, "loss": 6.0}]
    history += [{"kind": "eval", "step": s, "loss": 6.0 - s / 10, "w_norm_mean": 1 + s, "x_norm_mean": 2.0,
                 "target_over_median_distance": 0.9} for s in (0, 10, 20, 30)]  # fmt: skip
    history += [{"kind": "energy", "step": s, "energy_kwh": 1e-5 * s, "tokens_per_joule": 81.25, "emissions_kg": 7e-6,
                 "method": "CPU measured by a test"} for s in (10, 20, 30)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history) + '{"kind": "ev')
    return {
        "root": root,
        "data": data,
        "relations": Path(relations),
        "harmonic": folder,
        "softmax": export(root / "softmax", BACKEND, "softmax", context=CONTEXT),
        "gpt2": export(root / "gpt2", BACKEND, "gpt2", context=2 * CONTEXT),
        "foreign": export(root / "foreign", byte_pairs(290), "softmax", context=CONTEXT),
    }


@pytest.fixture(scope="module")
def settings(places) -> AnalysisSettings:
    return AnalysisSettings(relations=str(places["relations"]), tokens=0, bootstrap=100)


@pytest.fixture(scope="module")
def report(places) -> Path:
    names, options = [str(places[name]) for name in LABELS], ["--tokens", "0", "--bootstrap", "100"]
    out = places["root"] / "report"
    assert main([*names, "--relations", str(places["relations"]), *options, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def text(report) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results(report) -> dict:
    return json.loads((report / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def twins(places, settings):
    """The analysis of two tied models without text."""
    return analyse([str(places["softmax"]), str(places["gpt2"])], settings)


class Page(HTMLParser):
    """Tags that are open at the end, every address and every id in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.tags, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            address = name in ("src", "href", "xlink:href")
            self.addresses += [value] if address else re.findall(r"url\((.*?)\)", value or "")
        if tag not in ("meta", "img", "br", "input", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(text, report):
    page = Page(text)
    assert page.open == []
    for address in page.addresses:
        inside = address.removeprefix("#") in page.ids or address.startswith("data:image/png;base64,")
        assert inside or (report / address).is_file(), address[:60]
    assert len(set(page.ids)) == len(page.ids)
    assert not re.search(r"https?://|@import|url\([^#]", re.sub(r"data:image/png;base64,[^\"]*", "", text))
    assert "nan" not in re.sub(r"<script.*?</script>|base64,[^\"]*", "", text, flags=re.DOTALL).split()
    assert '<meta name="viewport"' in text and "@media print" in text
    # The summary comes before everything else, and figures have a text for those who do not see them.
    places = [text.index(part) for part in ('id="summary"', 'id="explorer"', 'id="reading"', "<figure", 'id="method"')]
    assert places == sorted(places)
    assert text.count('<svg role="img" aria-label=') == page.tags.count("figure") == len(FIGURES)
    assert re.search("<text[^>]*>accuracy</text>", text)  # letters, not outlines of letters
    # The scripts take the swatches and labels from the list.
    items = re.findall(r"<li>(<span.*?</span>)<b>(.*?)</b>", text)
    assert items == [(swatch(i), label) for i, label in enumerate(LABELS)]
    assert text.count('<ul id="models">') == 1 and '"#models .swatch"' in text
    assert all(f"<th>{name}</th>" in text for name in VARIANTS)


def test_figures_are_whole_and_signed(text, report):
    """A caption is on the page once and says what was measured."""
    assert {path.stem for path in (report / "figures").iterdir()} == FIGURES
    for name in FIGURES:
        assert (report / "figures" / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        pixels = imread(report / "figures" / f"{name}.png")[..., :3]
        assert pixels.shape[1] == 960 and pixels.std() > 0.02, name
        # Nothing is cut off: the outermost columns and rows are empty.
        assert pixels[:, [0, -1]].min() > 0.9 and pixels[[0, -1]].min() > 0.9, name
    figures = re.findall(r'<figure id="(\w+)">(.*?)</figure>', text, re.DOTALL)
    sources = {name: found[1] for name, figure in figures if (found := re.search('"source">(.*?)</p>', figure))}
    assert sources.keys() | {"plane_of_relation_1", "plane_of_vocabulary_1"} == FIGURES
    counts = rf"{TOKENS:,} \(harmonic, softmax, gpt2\), \d+ \(foreign\)"
    assert re.search(f"Measured on {counts} validation tokens", sources["reliability"])
    assert "On 512 sampled validation positions" in sources["layers"] and counts_text({}) == "no"
    assert re.search(rf"Measured on the whole validation text \({counts} tokens in \d+", text)
    assert "Relations: /" in text[text.index('<section id="planes"') : text.index('id="plane_of_relation_1"')]
    assert all(text.count(source) == 1 for name, source in sources.items() if name in ("cka", "layers"))
    # The planes show the tokens at their points, not the words, of which most have several tokens.
    last = {BACKEND.decode([encode(BACKEND, word)[-1]]).replace(" ", "␣") for pair in PAIRS for word in pair}
    for figure in (figure for name, figure in figures if name.startswith("plane_")):
        shown = set(re.findall(r"<text[^>]*>([^<>]*[a-z][^<>]*)</text>", figure))
        labels = {label for label in shown if not re.search("component|pairs|variance|vocabulary's|relation's", label)}
        assert labels and labels <= last, labels - last


def data_of(text: str, name: str):
    return json.loads(re.search(rf'id="{name}">(.*?)</script>', text, re.DOTALL)[1])


def test_the_reader_holds_every_position(text, results):
    readings = data_of(text, "reading-data")
    tokens = ["".join(seen["token"] for seen in found["seen"]) for found in readings]
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3]  # read with another tokenizer, in fewer tokens at a time
    for label, found, own, model in zip(LABELS, readings, tokens, results["models"], strict=True):
        assert (found["before"] + own)[:40] == VAL[:40]
        assert len(found["seen"]) == len(model["reading"])
        for seen in found["seen"]:
            assert 0 < seen["p"] <= 1
            assert (seen["ratio"] is None) == (label != "harmonic")
            assert seen["ratio"] is None or (seen["ratio"] >= 1 and seen["nearest"][0][2] == pytest.approx(1))
            assert seen["rank"] > 1 or seen["nearest"][0][0] == seen["token"]


def test_what_the_page_reads_is_in_its_data(text, results):
    """Each key that a script takes from the data is there for every model, and the scripts name each key."""
    data, scripts = data_of(text, "explorer-data"), text[text.rindex("<script>") :]
    assert data.keys() == {"models", "vocabularies", "pins"}
    assert [model["vocabulary"] for model in data["models"]] == [0, 0, 0, 1]
    for entries in (data["models"], data["vocabularies"]):
        assert all(entry.keys() == entries[0].keys() for entry in entries)
        assert all(re.search(rf"\b{key}\b", scripts) for key in entries[0])
    used = set(re.findall(r"(?:numbers|integers|nearest)\((?:model|vocabulary)\.(\w+)", scripts))
    assert {"length", "tokens", "neighbours", "contexts", "counts"} <= used
    assert used <= data["models"][0].keys() | data["vocabularies"][0].keys()
    harmonic, _, _, foreign = data["models"]
    assert (harmonic["harmonic"], foreign["harmonic"]) == (True, False)
    assert [len(vocabulary["texts"]) for vocabulary in data["vocabularies"]] == [VOCAB, 290]
    assert len(unpack(foreign["neighbours"]["items"])) == 290 * explorer.NEIGHBOURS
    # The text in the model's tokens. A piece of it, here a window, begins with a token that was not predicted.
    ids, losses = unpack(harmonic["text"]["ids"]), unpack(harmonic["text"]["losses"])
    assert ids[~np.isnan(losses)].tolist() == encode(BACKEND, VAL)[1:].tolist()
    assert np.isnan(losses).sum() == results["data"]["windows"]


def rows_of(text: str) -> dict[str, list[str]]:
    """Heading of each row of the tables → its cells."""
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", text)
    return {name.strip("\N{NO-BREAK SPACE}↓↑"): re.findall("<td.*?> *(.*?)</td>", cells) for name, cells in rows}


def test_tables(text, results):
    """A number that repeats another row is a word."""
    rows = rows_of(text)
    for name in ("offset consistency, centres", f"parallelogram score ({OF_CENTRES})"):
        assert rows[name][0][0].isdigit() or rows[name][0][0] == "-"
        assert rows[name][1:] == ["tied"] * 3
    assert rows["centres"][2:4] == ["tied", "–"]  # in the table of variants
    assert all(model["words"]["centres"] == model["words"]["input"] for model in results["models"][1:])
    assert rows["accuracy of the nearest centre"][0] == "= accuracy" != rows["accuracy of the nearest centre"][1]
    headings = re.findall('<tr class="group"><th colspan="5">(.*?)</th>', text)
    assert headings == ["On the whole validation text", "Relations between words", "Vectors", "Training"]
    # Energy up to the step of the model, and where it was measured.
    assert [(model["energy"] or {}).get("step") for model in results["models"]] == [20, None, None, None]
    assert rows["energy of the training, kWh"] == ["0.0002", "–", "–", "–"]
    assert rows["training tokens per joule"][0] == "81.2" and rows["emissions of the training, kg CO2eq"][0] == "7e-06"
    assert text.count("Energy of ") == 1 and re.search("Energy of harmonic, .*: CPU measured by a test", text)
    # Models with the same tokenizer share a table of the pairs used.
    details = re.search(r"<summary>Number of pairs used.*?</details>", text, re.DOTALL)[0]
    assert re.findall(r"<b>(.*?)</b>", details)[0] == "harmonic, softmax, gpt2"
    assert re.search(r'<tr><th>plural</th><td class="number">10 of 10</td>', details)


def test_equal_variants_count_once_and_tests_know_their_power(twins, text):
    """The centres of two tied models are their input embeddings, so two variants repeat two others."""
    other = twins.models[1]
    tests = {test["variant"]: test["difference"] for test in comparisons(twins, other)}
    assert tests["centres"] == tests[BAEK2025] and len(set(tests.values())) < len(tests)
    assert f"of {len(set(tests.values()))} variants of the score" in page(twins, page_sections(twins), defaultdict(str))
    # 10 pairs give 5 differences: p is 2 / 2^5 > 0.05 at least.
    assert text.count("The test cannot become significant in any of them") == 2
    assert "foreign</b> against <b>harmonic</b>: no test compares their parallelograms, since their tokenizers" in text
    row = {"variant": BAEK2025, "relation": "plural"}
    assert relations_without_power([row], other) == ["plural"]
    scores = parallelograms.baek2025_scores(other)
    scores["plural"] = replace(scores["plural"], disjoint=np.ones(6))
    assert relations_without_power([row], other) == []  # 2 / 2^6
    assert relations_without_power([row] * 2, other) == ["plural"] * 2  # twice that, by Holm


def test_results(results):
    assert [model["label"] for model in results["models"]] == LABELS
    assert results["data"]["evaluated_tokens"] == TOKENS
    harmonic, softmax, gpt2, foreign = results["models"]
    assert (harmonic["step"], harmonic["tokens_seen"]) == (20, 20_000)
    assert harmonic["quality"]["accuracy"] == harmonic["quality"]["nearest_accuracy"]
    assert [row["step"] for row in harmonic["checkpoints"]] == [10, 20]
    assert harmonic["checkpoints"][-1]["centre_norm"] == pytest.approx(harmonic["geometry"]["centres"]["norms"]["mean"])
    assert harmonic["geometry"]["centres"] != harmonic["geometry"]["input"]
    assert softmax["geometry"]["centres"] == softmax["geometry"]["input"]
    text_bytes = len(BACKEND.decode(encode(BACKEND, VAL)[1:]).encode())
    for model in (harmonic, softmax, gpt2):
        quality = model["quality"]
        for name in ("loss", "bits_per_byte"):
            assert quality[name]["low"] < quality[name]["value"] < quality[name]["high"]
        nats = quality["loss"]["value"] * TOKENS
        assert quality["bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / text_bytes)
        assert sum(band["positions"] for band in model["bands"]) == TOKENS
        assert sum(band["loss"]["value"] * band["positions"] for band in model["bands"]) == pytest.approx(nats)
        assert len(model["logit_lens"]) == 3
        assert "baek2025: fewer than 4 pairs can be used of tiny (3 of 3)" in model["skipped"]
        assert any(entry.startswith("100 components: the model has only 32 dimensions") for entry in model["skipped"])
        assert set(model["parallelograms"][BAEK2025]["relations"]) == {"plural"}
    assert foreign["bands"] == []
    # Tests between models are corrected, and only where they make sense.
    assert {row["model"] for row in results["comparisons"]} == {"softmax", "gpt2"} == set(results["cka_with_the_first"])
    assert any("foreign and harmonic have different tokenizers" in note for note in results["notes"])
    assert any("foreign has another tokenizer than" in note and "Bits per byte" in note for note in results["notes"])
    for row in results["comparisons"]:
        assert row["low"] <= row["high"] and 0 < row["p"] <= row["p_holm"] <= 1
    assert np.array(results["cka_with_the_first"]["softmax"]).shape == (3, 3)


def test_the_same_command_gives_the_same_numbers(places, results, settings):
    again = analyse([str(places["harmonic"]), str(places["softmax"])], settings)
    loss = again.models[0].found["predictions"]["quality"]["loss"].value
    assert loss == results["models"][0]["quality"]["loss"]["value"]
    first = [row for row in results["comparisons"] if row["model"] == "softmax"]
    assert comparisons(again, again.models[1]) == first
    assert readability(again.models[0]).keys() == READABILITY.keys()
    alone = restricted(again, 1)
    assert len(alone.models) == 1 and not any(alone.compared.values())


def test_a_model_alone_and_without_text_in_place_of_another_report(places, report, text, tmp_path, capsys):
    out = shutil.copytree(report, tmp_path / "out")
    stranger = out / "figures" / "of_a_stranger.png"
    stranger.write_bytes(b"mine")
    options = ["--relations", str(places["relations"]), "--out", str(out), "--bootstrap", "100"]
    assert main([str(places["softmax"]), *options]) == 2
    error = capsys.readouterr().err
    assert "out holds a report" in error and "--overwrite" in error
    assert (out / "index.html").read_text(encoding="utf-8") == text
    assert main([str(places["softmax"]), *options, "--overwrite"]) == 0
    captured = capsys.readouterr()
    names = {path.stem for path in (out / "figures").iterdir()} - {stranger.stem}
    assert names == set(json.loads((out / "results.json").read_text())["figures"]) < FIGURES
    assert stranger.read_bytes() == b"mine"
    assert "nothing was measured on text" in captured.err and captured.out.startswith(f"{out}/index.html")
    text = (out / "index.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    assert "sampled validation positions" not in text
    # The model is tied: nothing about its centres is listed twice.
    assert "input embedding, also centres (tied)" in text
    assert not {"offset consistency, centres", "centres", OF_CENTRES} & rows_of(text).keys()


def test_a_report_is_written_where_there_is_room_only(twins, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    words = ("cannot be written: ", "No space left on device; choose another folder")
    refused(words, write_report, restricted(twins, 1), tmp_path / "out")


def test_a_text_and_words_of_ones_own(places, settings, tmp_path):
    (tmp_path / "text.txt").write_text(own := VAL[:200])  # several times the context
    own_settings = replace(settings, text=str(tmp_path / "text.txt"), words=("with", " the", "Zebra"))
    analysis = analyse([str(places["softmax"])], own_settings)  # without data
    found = analysis.models[0]
    tokens = encode(BACKEND, own)
    seen = reading.result_of(found)
    assert len(tokens) > 2 * CONTEXT and "".join(each.token for each in seen) == own[-sum(len(s.token) for s in seen) :]
    with loaded(find_sources([str(places["softmax"])])[0], CPU) as model:  # the last piece is a whole context
        last = reading.read_text(model, tokens[-CONTEXT - 1 : -1], tokens[-CONTEXT:], reading.NEAREST)[-1]
        half = slice(CONTEXT // 2, CONTEXT + CONTEXT // 2)  # and others begin half a context before what is new
        second = reading.read_text(model, tokens[:-1][half], tokens[1:][half], reading.NEAREST)
    assert len(seen) == len(tokens) - 1 and seen[-1] == last and seen[CONTEXT] == second[CONTEXT // 2]
    (note,) = (note for note in analysis.notes if "--words" in note)
    assert f"--words Zebra is {len(encode(BACKEND, 'Zebra'))} tokens in the vocabulary of 320: Z · " in note
    assert centres.result_of(found)[0]["token"] in "with"
    text = page(analysis, page_sections(analysis), defaultdict(str))
    assert "the last token of each of --words" in text
    assert "contexts" not in text[text.index('<section id="centres"') : text.index('<section id="method"')]
    assert all(len(word["neighbours"]) == 10 and word["contexts"] == [] for word in centres.result_of(found))


def test_sources(places, tmp_path):
    run = places["harmonic"]
    refused("is named twice", find_sources, [str(run), str(run / LATEST)])
    (twin := tmp_path / "softmax").mkdir()  # two folders of one name have different labels
    for name in ("config.json", "model.safetensors"):
        (twin / name).symlink_to(places["softmax"] / name)
    first, second = find_sources([str(places["softmax"]), str(twin)])
    assert first.label != second.label and second.label.startswith("softmax (")
    refused("no tokenizer can be loaded from", loaded(second, CPU).__enter__)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tokens", "-1"], r"--tokens must be 0 \(the whole validation split\) or more; got -1"),
        (["--bootstrap", "10"], "--bootstrap must be at least 100 resamples for an interval; got 10"),
        (["--seed", "-1"], "--seed must be 0 or more; got -1"),
        (["--device", "quantum"], "--device quantum cannot be used here"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--relations", "/nowhere"], "--relations /nowhere: there is no such folder"),
        (["--out", __file__], "is a file; name a folder"),
        (["--out", "site", "--overwrite"], "site holds an index.html or a results.json that is not of a report"),
        (["--distance-file", "none.py"], "--distance-file: "),
        (["--text", "short.txt"], r"short\.txt has 1 tokens, but at least 2"),
        (["--text", "none.txt"], "cannot be read as UTF-8"),
        (["--words", ""], "--words '' has no token"),
        (["--data", "data", "--tokens", "30"], r"validation tokens are too few .* raise --tokens to at least 64"),
    ],
)
def test_wrong_options_are_one_line_with_status_2(places, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "data").symlink_to(places["data"])
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("of a stranger")
    relations = ["--relations", str(places["relations"])]
    assert main([str(places["softmax"]), "--out", str(tmp_path / "x"), *relations, *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_page_on_a_telephone_and_on_paper(browser, report):
    """What is wider than the screen says so, and what is not divided between pages leaves little of a page empty."""
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto((report / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for figure in page.locator("figure:visible .scroll").all():
        wider = figure.evaluate("box => box.scrollWidth > box.clientWidth")
        assert wider == ("wider" in figure.evaluate("box => getComputedStyle(box, '::before').content"))
    assert not page.locator(".print").first.is_visible()
    page.set_viewport_size({"width": 688, "height": 1017})  # A4 without the margins of the page
    page.emulate_media(media="print")
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert "open index.html in a browser" in page.locator(".print").first.inner_text()
    heights = page.evaluate("""[...document.querySelectorAll("body *")]
        .filter(one => getComputedStyle(one).breakInside == "avoid" && !one.closest("svg *"))
        .map(one => one.getBoundingClientRect().height)""")
    assert len(heights) > 100 and max(heights) < 0.4 * 1017
    page.close()


@pytest.mark.slow
def test_gpt2_small_with_twelve_relations_in_four_gigabytes(tmp_path):
    """124 M parameters, V = 50257: the whole command in a process of its own."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder := tmp_path / "gpt2")
    load_tokenizer("gpt2").save(folder)
    hf_tokenizer(folder / "tokenizer.json", 1024).save_pretrained(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    data = prepare(tmp_path / "data", backend, "\n".join(pydoc_data.topics.topics.values()))
    subprocess.run(
        [sys.executable, "-m", "hgpt.interpret", folder, "--data", data, "--out", tmp_path / "out"], check=True
    )
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4e6  # kB
