"""benchmarks/sampling.py runs and prints one row for each head and batch."""

from benchmarks.sampling import main


def test_it_prints_its_table(capsys):
    sizes = "--layers 1 --heads 2 --dim 16 --vocab 50 --prompt 4 --new-tokens 6 --batch 1 3 --rounds 1 --threads 1"
    main(sizes.split())
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [tuple(row[:2]) for row in rows] == [(f"| {head}", n) for n in "13" for head in ("harmonic", "softmax")]
    for row in rows:
        assert float(row[2].replace(",", "")) > 0
        assert 0 < float(row[-1].rstrip("% |")) < 100
    assert float(rows[0][4]) > 0 and rows[2][4] == ""
