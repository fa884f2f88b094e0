"""The one exception for mistakes in what the user gave: a file, a flag, a folder, a combination of settings."""


class UserError(ValueError):
    """What went wrong, where (file and line, row, config key) and what to do about it.

    Scripts print the message without a traceback and exit with code 2.
    """
