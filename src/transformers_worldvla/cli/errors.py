"""What a command raises when the user's input is at fault."""


class UserError(Exception):
    """Bad input. Its message is the one line the user reads: what is wrong and what to do."""


# bad input that lower layers notice: a wrong value, a file that is not there, an extra that is not installed
BAD_INPUT = (UserError, ValueError, OSError, ImportError)


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__
