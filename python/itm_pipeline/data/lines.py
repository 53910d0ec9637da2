"""Reading caption and id files: one entry a line, UTF-8, every fault told with its line number."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def read_lines(path: Path, what: str) -> list[str]:
    """Lines of ``path``, stripped of surrounding white space.

    Lines end at a line feed (with or without a carriage return) and nowhere else, so that a caption holding one of
    Unicode's rarer separators stays one caption.

    Parameters
    ----------
    path
        The file; a byte order mark at its start is skipped.
    what
        What a line holds ("caption", "image id"), for messages.

    Raises
    ------
    UserError
        When the file is missing or empty, a line is empty, or a line is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the data folder and the name of the split") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines = []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} line {number}: not UTF-8 (byte {raw[error.start]:#04x} at position {error.start}); "
                "save the file as UTF-8"
            ) from None
        if not line:
            if not content.strip():
                raise UserError(f"{path}: the file is empty; it must hold one {what} a line")
            raise UserError(f"{path} line {number}: empty {what}; every line must hold one, so fill it or remove it")
        lines.append(line)
    return lines
