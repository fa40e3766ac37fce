"""data_prep/openwebtext.py: nanoGPT's split and tokens, parts and merging, and every bad input."""

import json
import shutil
import signal
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_texts import as_nanogpt, contents, fails, read_back, small_units, status, streams, texts, write_parquet
from test_resuming import start

from data_prep import openwebtext, verify
from data_prep.encoding import Tally
from data_prep.openwebtext import main
from data_prep.parts import units_of_part
from data_prep.splits import IndexSplit, nanogpt_indices
from data_prep.summary import ProgressBar, length_table
from hgpt.data.shards import read_meta
from hgpt.data.tokenizer import load_tokenizer
from hgpt.data.verify import verify as verify_shards

TEXTS = texts(300)
SMALL = ["--tokenizer", "bpe:300", "--val-fraction", "0.1", "--tokens-per-shard", "3000", "--workers", "1"]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    small_units(monkeypatch)


def make_source(folder):
    """Three Parquet files of 300 documents together."""
    for number in range(3):
        write_parquet(folder / f"train-{number:05}-of-00003.parquet", TEXTS[100 * number : 100 * (number + 1)])
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


def run(source, out, *options):
    assert status(main, "--source", source, "--out", out, *SMALL, *options) == 0
    return out


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    return run(source, tmp_path_factory.mktemp("whole") / "out")


# ------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize(
    ("documents", "fraction"), [(2, 0.0005), (1999, 0.0005), (2001, 0.0005), (13_702, 0.0005), (300, 0.1)]
)
def test_split_is_that_of_datasets(documents, fraction):
    import datasets  # here, and not in each process that runs something of this file

    table = datasets.Dataset.from_dict({"place": range(documents)})
    expected = table.train_test_split(test_size=fraction, seed=2357, shuffle=True)
    found = nanogpt_indices(documents, fraction, 2357)
    assert found.tolist() == sorted(expected["test"]["place"])
    split = IndexSplit(val=found)
    for side, places in (("train", expected["train"]["place"]), ("val", expected["test"]["place"])):
        assert all(split.side(place, "") == side for place in places)


def test_split_of_openwebtext_is_pinned():
    # The order of numpy.random.default_rng(2357), which NumPy does not promise to keep: were it to change, validation
    # losses could no longer be compared with those of others.
    val = nanogpt_indices(openwebtext.DOCUMENTS, 0.0005, 2357)
    assert len(val) == 4007 and val[:4].tolist() == [1997, 3930, 5738, 8090]
    assert int(val.sum()) == 15_941_513_342


def test_shards_hold_the_split_in_the_order_of_the_source(whole):
    verify_shards(whole)
    assert read_back(whole) == (expected := as_nanogpt(TEXTS))
    meta = read_meta(whole)
    assert len(meta.splits["train"].shards) > 3
    assert meta.splits["train"].bytes == sum(len(text.encode()) for text in expected["train"])
    assert (meta.preparation["documents"], meta.preparation["documents_of_openwebtext"]) == (300, 8_013_769)
    assert (meta.preparation["seed"], meta.preparation["val_fraction"]) == (2357, 0.1)
    assert {"numpy", "pyarrow", "tiktoken", "hgpt"} <= meta.packages.keys()


def test_tokens_are_those_of_nanogpt(tmp_path, source):
    """Of the same documents: `encode_ordinary` of each, then end-of-text."""
    assert status(main, "--source", source, "--out", tmp_path / "out", "--workers", "1") == 0
    encoding = load_tokenizer("gpt2")._fast  # the tests of the tokenizer compare it with tiktoken's own
    found = streams(tmp_path / "out")
    for split, documents in as_nanogpt(TEXTS, 0.0005).items():
        assert found[split] == [token for text in documents for token in [*encoding.encode_ordinary(text), 50256]]


def test_every_kind_of_source_gives_the_same_shards(tmp_path, whole):
    for number, document in enumerate(TEXTS):
        (tmp_path / f"{number:05}.txt").write_text(document)
    assert streams(run(tmp_path, tmp_path / "out")) == streams(whole)


@pytest.mark.parametrize(
    ("train", "val", "report"),
    [
        (9_035_582_198, 4_434_897, "train and val have as many tokens as nanoGPT's"),
        (9_035_582_489, 4_434_606, "291 fewer in val than the 9,035,582,198 and 4,434,897, which nanoGPT reports"),
        (9_035_582_189, 4_434_906, "9 more in val than"),
        (9_035_582_199, 4_434_897, "the text differs"),
    ],
)
def test_a_number_of_tokens_that_is_not_nanogpts_is_reported(train, val, report):
    """For all of OpenWebText, and only there."""
    tally = Tally()
    tally.missing = 8_013_769 - 2
    for split, tokens in (("train", train), ("val", val)):
        tally.counts[split].tokens, tally.counts[split].documents = tokens, 1
    record = SimpleNamespace(settings={"documents": 8_013_769, "val_fraction": 0.0005, "seed": 2357}, tokenizer="gpt2")
    recipe = openwebtext.OpenWebText(tokenizer="gpt2", val_fraction=0.0005, seed=2357)
    (line,) = recipe.remarks(record, tally)
    assert report in line and ("others found" in line) == (val == 4_434_606)
    record.settings["seed"] = 1
    assert recipe.remarks(record, tally) == []


# ------------------------------------------------------------------------------------------------------- parts


@pytest.fixture(scope="module")
def parts(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("parts") / "out"
    with pytest.MonkeyPatch.context() as patch:
        small_units(patch)
        for part in (2, 1):
            run(source, out, "--part", f"{part}/2")
    return out


@pytest.fixture
def copy(parts, tmp_path):
    shutil.copytree(parts, tmp_path / "copy")
    return tmp_path / "copy"


def test_parts_are_merged_into_the_same_streams(copy, whole, source, capsys):
    before = contents(copy / "part_2_of_2")
    for seed, code in ((2357, 0), (1, 2)):  # done already; never overwritten
        assert status(main, "--source", source, "--out", copy, *SMALL, "--part", "2/2", "--seed", seed) == code
    assert contents(copy / "part_2_of_2") == before
    for _ in range(2):
        assert status(main, "--out", copy, "--merge") == 0
    verify_shards(copy)
    assert streams(copy) == streams(whole)
    ours, theirs = read_meta(copy), read_meta(whole)
    assert (ours.preparation.pop("parts"), theirs.preparation.pop("parts")) == (2, 1)
    assert ours.preparation == theirs.preparation and ours.packages == theirs.packages
    others = {path.name for path in copy.iterdir() if path.suffix != ".bin"}
    assert others == {"meta.json", "tokenizer.json", "train_counts.json"}
    printed = capsys.readouterr().out
    assert "merged from       2 parts" in printed and f"python -m data_prep.verify {copy}" in printed


@pytest.mark.parametrize("kill_at", [20, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 60, 3))])
def test_merging_that_was_killed_goes_on(copy, parts, tmp_path, kill_at):
    process = start(copy, kill_at, main, "--out", str(copy), "--merge")
    process.join()
    if process.exitcode:
        assert process.exitcode == -signal.SIGKILL and status(main, "--out", copy, "--merge") == 0
    shutil.copytree(parts, tmp_path / "other")
    assert status(main, "--out", tmp_path / "other", "--merge") == 0
    assert contents(copy) == contents(tmp_path / "other")


def test_parts_that_do_not_belong_together(copy, source, tmp_path, capsys):
    merge = ("--out", copy, "--merge")
    assert "is no readable folder" in fails(capsys, main, "--out", tmp_path / "nowhere", "--merge")
    assert "--seed has no effect with --merge" in fails(capsys, main, *merge, "--seed", 1)
    second = copy / "part_2_of_2"
    second.rename(tmp_path / "away")
    assert "2/2 is missing" in fails(capsys, main, *merge)
    run(source, copy, "--part", "2/2", "--seed", 7)
    assert "another seed than part 1: 7, not 2357" in fails(capsys, main, *merge)
    second.rename(copy / "part_2_of_3")
    assert "of 2 and of 3 parts" in fails(capsys, main, *merge)


def test_parts_that_are_damaged(copy, capsys):
    part, merge = copy / "part_1_of_2", ("--out", copy, "--merge")
    record = json.loads((part / "part.json").read_text())
    for name, damage in (
        ("part.json", lambda content: json.dumps(record | {"shards": {"train": [1]}}).encode()),
        ("part.json", lambda content: json.dumps(record | {"shards": {}}).encode()),
        ("part.json", lambda content: json.dumps(record | {"tally": None}).encode()),
        ("tokenizer.json", lambda content: content[:-1]),
        ("train_000000.bin", lambda content: content[:-2]),
    ):
        content = (part / name).read_bytes()
        (part / name).write_bytes(damage(content))
        assert f"part_1_of_2/{name}" in fails(capsys, main, *merge)
        (part / name).write_bytes(content)
    for name in ("train_000000.bin", "tokenizer.json"):
        (part / name).rename(part / "away")
        assert f"part_1_of_2/{name} is missing" in fails(capsys, main, *merge)
        (part / "away").rename(part / name)
    message = fails(capsys, verify.main, part)  # a part is no data folder
    assert f"python -m data_prep.openwebtext --out {copy} --merge" in message and "Delete" not in message
    assert status(main, *merge) == 0
    verify_shards(copy)


def test_shares_of_the_work():
    units = [SimpleNamespace(bytes=size) for size in (50, 10, 10, 30)]
    assert [units_of_part(units, (i, 2)) for i in (1, 2)] == [units[:1], units[1:]]
    with pytest.raises(openwebtext.UserError, match="--part 2/8: there is nothing left for this part; the 4 units"):
        units_of_part(units, (2, 8))


# ----------------------------------------------------------------------------------------------------- bad input


def test_null_rows_keep_their_places_and_empty_documents_are_documents(tmp_path, capsys):
    documents = list(TEXTS)
    for place, text in {0: None, 5: "", 6: " ", 17: None, 18: None, 299: None}.items():
        documents[place] = text
    write_parquet(tmp_path / "a.parquet", documents)
    folder = run(tmp_path / "a.parquet", tmp_path / "out")
    assert read_back(folder) == as_nanogpt(documents)
    meta = read_meta(folder)
    assert meta.preparation["documents_without_text"] == 4
    assert sum(split.documents for split in meta.splits.values()) == 296
    assert "without text      4 documents" in capsys.readouterr().out


def test_what_cannot_be_read_is_left_out_and_named_if_asked(tmp_path, source, capsys):
    folder = shutil.copytree(source, tmp_path / "source")
    (folder / "train-00003.parquet").touch()
    damaged = folder / "train-00001-of-00003.parquet"  # whole but for one row group, which a worker finds
    with pq.ParquetFile(damaged) as file:
        chunk = file.metadata.row_group(3).column(0)
    content, start = damaged.read_bytes(), chunk.dictionary_page_offset or chunk.data_page_offset
    damaged.write_bytes(content[:start] + bytes(200) + content[start + 200 :])
    base = ("--source", folder, "--out", tmp_path / "out", *SMALL)
    message = fails(capsys, main, *base)
    assert "train-00003.parquet cannot be read: it is empty, 0 bytes" in message and "With --skip-bad" in message
    assert not (tmp_path / "out").exists()
    (folder / "train-00003.parquet").unlink()
    base = (*base, "--tokenizer", "gpt2")
    for workers in (1, 2):
        message = fails(capsys, main, *base, "--workers", workers)
        assert f"{damaged.name} cannot be read" in message and "the same command resumes" in message
    (folder / "train-00003.parquet").touch()
    out = run(folder, tmp_path / "other", "--skip-bad")
    printed = capsys.readouterr().out
    assert "could not be read 2:" in printed and f"{damaged.name}: 7 documents cannot be read" in printed
    meta = read_meta(out)
    assert "train-00003.parquet" in str(meta.preparation["left_out"])
    assert (meta.preparation["documents"], meta.preparation["documents_without_text"]) == (300, 7)
    assert read_back(out) == as_nanogpt([*TEXTS[:121], *[None] * 7, *TEXTS[128:]])


def test_bad_sources(tmp_path, capsys):
    base = ("--out", tmp_path / "out", *SMALL)
    write_parquet(tmp_path / "none.parquet", pa.array([], pa.string()))
    assert "none.parquet holds no documents" in fails(capsys, main, *base, "--source", tmp_path / "none.parquet")
    write_parquet(tmp_path / "one.parquet", ["one"])
    assert "All the text is one document" in fails(capsys, main, *base, "--source", tmp_path / "one.parquet")
    (tmp_path / "z.jsonl").write_text('{"text": "x"}')
    assert "holds .jsonl and .parquet files" in fails(capsys, main, *base, "--source", tmp_path)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ progress and summary


def test_progress_line(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("data_prep.summary.time.perf_counter", lambda: now[0])
    earlier, new = Tally(missing=10), Tally(missing=5)
    earlier.counts["train"].documents, earlier.counts["train"].tokens = 90, 500_000
    new.counts["train"].documents, new.counts["val"].documents = 190, 5
    new.counts["train"].tokens, new.counts["val"].tokens = 2_900_000, 100_000
    new.counts["train"].bytes, new.counts["val"].bytes = 7_500_000, 500_000
    bar = ProgressBar(400, earlier)
    now[0] += 2
    bar.update(new)
    bar.close()
    line = capsys.readouterr().err.split("\r")[-1]
    # 300 of 400 documents; the rates are those of this run, the tokens are all.
    assert " 75% " in line and "300/400 documents, 3.5 M tokens, 1.50 M tokens/s, 4.0 MB/s, " in line


def test_length_distribution():
    tally = Tally()
    for tokens in (0, 1, 2, 3, 4, 1000, 1023, 1024):
        tally.add_length(tokens)
    lines = length_table(tally)
    assert "2 to 3" in str(lines) and "1,024 to 2,047" in str(lines)
    (row,) = [line.split() for line in lines if "512 to 1,023" in line]
    assert row[3:6] == ["2", "25.0%", f"{2023 / 3057:.1%}"]
    assert "longest 1,024 tokens" in lines[-2]
