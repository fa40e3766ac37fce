"""hgpt/cli.py: how commands end."""

import os
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


def test_other_exceptions_are_raised():
    with pytest.raises(ZeroDivisionError):
        run(lambda _: 1 / 0, [])


@pytest.mark.parametrize("lines", [1, 1_000_000])
def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capsys, lines):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(lambda _: "x\n" * lines, []) == 0
    assert not capsys.readouterr().err


def test_another_broken_pipe_is_raised(monkeypatch):
    def main(_):
        raise BrokenPipeError

    reading, writing = os.pipe()
    with open(reading), open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(BrokenPipeError):
            run(main, [])
