"""Parser and exit of every command but train.py, whose exit codes are in hgpt/run/stop.py. A command ends with

if __name__ == "__main__":
    sys.exit(run(main))

where `main` takes the arguments, returns the text to print (or None) and raises UserError for bad input.
"""

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from hgpt.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError for bad arguments, with one line in place of the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists every option)")


def run(
    main: Callable[[Sequence[str]], str | None],
    arguments: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """Call `main`, print the text that it returns, and return the exit status.

    0: done, or the reader of standard output (`| head`) has closed it. 2: UserError, printed as one message without a
    traceback. 130: Ctrl-C. Other exceptions are raised.

    Args:
        arguments: default: the command line's.
        interrupted: what to print after Ctrl-C, such as what is saved and how to resume.
    """
    try:
        text = main(sys.argv[1:] if arguments is None else arguments)
        if text is not None:
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
            print(text)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _output_is_closed():  # some other pipe, such as that of a worker process
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
    return 0


def _output_is_closed() -> bool:
    """Whether the reader of standard output has closed it."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))
