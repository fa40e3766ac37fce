"""The one exception that means: the input is wrong, and its message says how to mend it."""


class UserError(Exception):
    """Bad input: a setting, a file or a folder that the user can mend.

    The message names the setting or the file, the rule, the value found and the way out. Entry points print
    it without a traceback and exit with status 2.
    """
