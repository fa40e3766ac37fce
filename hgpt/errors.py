"""The exception for bad input, and the first line of any other."""


class UserError(Exception):
    """Bad input: a setting, a file or a folder that the user can correct.

    The message names the setting or the file, the rule, the value found and the way out. Commands print it without a
    traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of the error's message; the error's type if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
