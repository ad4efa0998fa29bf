"""The base class of errors that the user's input causes."""

from typing import ClassVar


class InputError(Exception):
    """The input is wrong: a file, a model or a setting. The same command would fail again, so it ends with exit code 2
    and no launcher repeats it."""

    transient: ClassVar[bool] = False  # True: the same command may succeed later
