"""hgpt/cli.py: how commands end."""

import subprocess
import sys

import pytest

from hgpt.cli import Parser, run
from hgpt.errors import UserError


def command(arguments):
    parser = Parser(prog="python -m x")
    parser.add_argument("--number", type=int, required=True)
    return f"number {parser.parse_args(arguments).number}"


def test_text_and_none(capsys):
    assert run(command, ["--number", "3"]) == 0
    assert run(lambda _: None, []) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("number 3\n", "")


@pytest.mark.parametrize("arguments", [[], ["--number"], ["--number", "x"], ["--number", "3", "--numbr", "4"], ["y"]])
def test_bad_arguments(capsys, arguments):
    assert run(command, arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and "(python -m x --help lists every option)" in line and not printed.out


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(UserError("set x"), 2, "error: set x\n"), (KeyboardInterrupt(), 130, "\nwhat is finished stays\n")],
)
def test_how_it_ends(capsys, error, status, message):
    def main(_):
        raise error

    assert run(main, [], interrupted="what is finished stays") == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", message)


@pytest.mark.parametrize("error", [ValueError("a mistake of ours"), SystemExit(3)])
def test_other_exceptions_are_raised(error):
    def main(_):
        raise error

    with pytest.raises(type(error)):
        run(main, [])


@pytest.mark.parametrize("statement", ["print('x\\n' * 1_000_000)", "return 'x'"])
def test_a_reader_that_has_seen_enough_is_no_error(statement):
    script = (
        "import sys\nfrom hgpt.cli import run\n"
        f"def main(_):\n    sys.stdin.readline()\n    {statement}\nsys.exit(run(main))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""


def test_another_broken_pipe_is_raised():
    script = "import sys; from hgpt.cli import run\ndef main(_): raise BrokenPipeError\nsys.exit(run(main))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr
