"""The one exception that speaks to the person at the keyboard."""


class InputError(ValueError):
    """Something the user gave can't be used.

    The message is one sentence that says what is wrong, with the value, and what would be right.
    Raised before any work starts. The command line prints it without a traceback and exits with
    code 2.
    """
