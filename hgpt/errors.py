"""The exception for bad input, whose message says how to correct it."""


class UserError(Exception):
    """Bad input: a setting, a file or a folder that the user can correct.

    The message names the setting or the file, the rule, the value found and the way out. Commands print it without a
    traceback and exit with status 2.
    """
