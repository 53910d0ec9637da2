"""The one exception that the command line turns into a sentence and exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one sentence: which file, line or row is wrong, and what to do about it.

    The command line prints the sentence without a traceback and exits with code 2. Code that raises it has
    written nothing yet, or has removed what it wrote.
    """
