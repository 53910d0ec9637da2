"""When a folder of scenes may be used as it is, when it is made anew, and when it is somebody else's.

The marker `complete.json` is written last, before the folder gets its name. It holds what was asked for, the version of
the drawing, and the size of every file of the splits, so that a folder that lost something is noticed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from itm_pipeline.errors import UserError
from itm_pipeline.scenes.picture import SPLITS

FORMAT = 2
"""Version of everything that the pictures, captions and features depend on. Raise it with every change of them."""

MARKER = "complete.json"
FILES = ("ims.npy", "caps.txt", "ids.txt", "ims_bbx.npy", "ims_size.npy", "scenes.jsonl")
"""The files of a split, after its name and an underscore."""

FOLDERS = {"images": ".png", "Sentences": ".txt", "Annotations": ".xml"}
"""The folders with one file a picture, and how its name ends."""


@dataclass(frozen=True)
class Request:
    """The seed of a set of scenes, and the number of pictures of its splits."""

    seed: int
    train: int
    dev: int
    test: int

    def check(self) -> None:
        """Raise `UserError` for a number that makes no set."""
        for split in SPLITS:
            pictures = getattr(self, split)
            if not 1 <= pictures <= 1_000_000:
                raise UserError(f"scenes: {split} must be 1 to 1000000 pictures, got {pictures}")
        if self.seed < 0:
            raise UserError(f"scenes: the seed must not be negative, got {self.seed}")

    def __str__(self) -> str:
        return f"seed {self.seed} with {self.train}/{self.dev}/{self.test} train/dev/test pictures"


def _split_files(folder: Path) -> dict[str, int]:
    """Size in bytes of every file of the splits that is there."""
    paths = [folder / f"{split}_{name}" for split in SPLITS for name in FILES]
    return {path.name: path.stat().st_size for path in paths if path.is_file()}


def write_marker(folder: Path, request: Request) -> None:
    """Declare a folder complete."""
    content = {"format": FORMAT, **asdict(request), "files": _split_files(folder)}
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _whole(folder: Path, request: Request, files: object) -> bool:
    pictures = request.train + request.dev + request.test
    counted = all(
        (folder / name).is_dir() and sum(1 for path in (folder / name).iterdir() if path.suffix == suffix) == pictures
        for name, suffix in FOLDERS.items()
    )
    return counted and _split_files(folder) == files


def usable(folder: Path, request: Request) -> bool:
    """Whether `folder` already holds the scenes asked for.

    Returns
    -------
    True: use it. False: it is not there, it is empty, or it is a set of scenes that another version of this program
    made or that lost files; make it anew.

    Raises
    ------
    UserError
        The folder holds scenes with another seed or other sizes, or something that is not a set of scenes.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder for the scenes")
    if not any(folder.iterdir()):
        return False
    marker = folder / MARKER
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        version = content["format"]
        made = Request(*(int(content[name]) for name in ("seed", "train", "dev", "test")))
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{folder}: is not empty and not a set of scenes ({MARKER} is missing or unreadable); "
            "name another folder, or remove this one"
        ) from None
    if made != request:
        raise UserError(
            f"{folder}: holds scenes of {made}, asked for were {request}; name another folder, or remove this one"
        )
    return version == FORMAT and _whole(folder, request, content.get("files"))
