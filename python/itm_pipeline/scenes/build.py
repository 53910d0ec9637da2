"""Makes a set of scenes on disk: pictures, captions, region features and word-to-box links.

    {split}_ims.npy        float32 [M, 36, F]   region features, one row per picture
    {split}_caps.txt       5 captions per picture
    {split}_ids.txt        image id, once per caption
    {split}_ims_bbx.npy    float32 [M, 36, 4]   x1 y1 x2 y2 in 0-based pixels
    {split}_ims_size.npy   int64 [M, 2]         height, width
    {split}_scenes.jsonl   one line per picture: what was drawn
    images/ID.png          the pictures
    Sentences/ID.txt, Annotations/ID.xml        Flickr30K Entities' layout (see `entities`)
    complete.json          seed, sizes, version (see `cache`)

Everything is written to a folder beside the one asked for, which gets its name when it is complete: a program that is
killed leaves no half-made set behind that could be taken for a whole one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from itm_pipeline.errors import UserError
from itm_pipeline.scenes.cache import FOLDERS, Request, usable, write_marker
from itm_pipeline.scenes.entities import annotation, marked, number_chains
from itm_pipeline.scenes.features import FEATURE_DIM
from itm_pipeline.scenes.grammar import plain
from itm_pipeline.scenes.picture import SPLITS, Picture, make_picture
from itm_pipeline.scenes.pool import drawing_pool, processes_for
from itm_pipeline.scenes.proposals import REGIONS
from itm_pipeline.scenes.world import HEIGHT, WIDTH

CHUNK = 20
"""Pictures that a process makes at a time."""

HUFFMAN_ONLY = 2
"""zlib's strategy for noise, in which there is nothing to match: twice as fast as the default, no larger."""


@dataclass(frozen=True)
class _Row:
    """What the files of a split say about one picture."""

    features: NDArray[np.float32]
    boxes: NDArray[np.float32]
    captions: str
    ids: str
    scene: str


def _write_picture(folder: Path, picture: Picture) -> _Row:
    """Write the files that a picture has of its own; return the rest."""
    name = picture.image_id
    chains = number_chains(picture.captions)
    image = Image.fromarray(picture.pixels)
    image.save(folder / "images" / f"{name}.png", compress_level=1, compress_type=HUFFMAN_ONLY)
    sentences = "".join(marked(caption, chains) + "\n" for caption in picture.captions)
    (folder / "Sentences" / f"{name}.txt").write_text(sentences, encoding="utf-8", newline="\n")
    links = annotation(name, (HEIGHT, WIDTH), chains, picture.boxes)
    (folder / "Annotations" / f"{name}.xml").write_text(links, encoding="utf-8", newline="\n")
    things = [
        {**asdict(thing), "box": box} for thing, box in zip(picture.scene.things, picture.boxes.tolist(), strict=True)
    ]
    scene = {"id": name, "background": picture.scene.background, "things": things}
    return _Row(
        features=picture.features,
        boxes=picture.proposals,
        captions="".join(plain(caption) + "\n" for caption in picture.captions),
        ids=f"{name}\n" * len(picture.captions),
        scene=json.dumps(scene) + "\n",
    )


def _make_rows(folder: Path, seed: int, split: str, span: tuple[int, int]) -> list[_Row]:
    """The work of one process: pictures `span[0]` to `span[1] - 1` of a split."""
    return [_write_picture(folder, make_picture(seed, split, index)) for index in range(*span)]


def _write_split(folder: Path, split: str, count: int, chunks: Iterator[list[_Row]], bar: tqdm[None]) -> None:
    """Write the files of a split from its rows, which come in order."""
    stem = str(folder / split)
    npy_format: Any = np.lib.format  # typed in NumPy 2.4, not before
    features = npy_format.open_memmap(f"{stem}_ims.npy", "w+", np.float32, (count, REGIONS, FEATURE_DIM))
    boxes = np.zeros((count, REGIONS, 4), np.float32)
    with (
        open(f"{stem}_caps.txt", "w", encoding="utf-8", newline="\n") as captions,
        open(f"{stem}_ids.txt", "w", encoding="utf-8", newline="\n") as ids,
        open(f"{stem}_scenes.jsonl", "w", encoding="utf-8", newline="\n") as scenes,
    ):
        at = 0
        for rows in chunks:
            for row in rows:
                features[at], boxes[at] = row.features, row.boxes
                captions.write(row.captions)
                ids.write(row.ids)
                scenes.write(row.scene)
                at += 1
            bar.update(len(rows))
    features.flush()
    np.save(f"{stem}_ims_bbx.npy", boxes)
    np.save(f"{stem}_ims_size.npy", np.tile(np.array([HEIGHT, WIDTH], np.int64), (count, 1)))


def _make_all(folder: Path, request: Request, asked_processes: int | None, progress: bool) -> None:
    for name in FOLDERS:
        (folder / name).mkdir()
    total = request.train + request.dev + request.test
    processes = processes_for(total, asked_processes)
    # disable=None: silent where stderr is no terminal
    bar = tqdm(total=total, desc="scenes", unit="picture", disable=None if progress else True)
    with bar, drawing_pool(processes) as pool:
        for split in SPLITS:
            count = getattr(request, split)
            spans = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
            work = partial(_make_rows, folder, request.seed, split)
            chunks = pool.map(work, spans) if pool else map(work, spans)
            _write_split(folder, split, count, chunks, bar)


def _put_in_place(made: Path, folder: Path, request: Request) -> None:
    """Give the finished folder its name, in place of one that is stale; a whole one that came meanwhile stays."""
    if usable(folder, request):
        return
    if folder.exists():
        aside = made.with_name(made.name + "-old")
        folder.rename(aside)
        made.rename(folder)
        shutil.rmtree(aside)
    else:
        made.rename(folder)


def make_scenes(
    folder: Path,
    *,
    train: int = 2000,
    dev: int = 200,
    test: int = 500,
    seed: int = 0,
    progress: bool = True,
    processes: int | None = None,
) -> Path:
    """Make a set of drawn scenes, or find it made.

    The files are a function of the seed and the sizes; the first pictures of a split do not even depend on the sizes.

    Parameters
    ----------
    folder
        Where the set is, or is to be.
    train, dev, test
        Pictures of each split.
    seed
        Another seed draws other pictures.
    progress
        Show a bar while drawing; there is none where stderr is no terminal.
    processes
        Processes to draw with; None takes one per core that this program may use, and one for a small set. A script
        that draws with several needs the usual `if __name__ == "__main__":`.

    Returns
    -------
    `folder`, which then holds the files that this module's head lists

    Raises
    ------
    UserError
        A size or seed that makes no set, a folder that holds something else, scenes of another seed or size, or that
        cannot be written.
    """
    folder = Path(folder)
    request = Request(seed=seed, train=train, dev=dev, test=test)
    request.check()
    if processes is not None and processes < 1:
        raise UserError(f"scenes: processes must be at least 1, got {processes}")
    if usable(folder, request):
        return folder
    made: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        made.chmod(0o755)  # mkdtemp makes a private folder; the set is as public as any other file
        _make_all(made, request, processes, progress)
        write_marker(made, request)
        _put_in_place(made, folder, request)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the scenes ({error.strerror or error})") from error
    finally:
        if made is not None and made.exists():
            shutil.rmtree(made, ignore_errors=True)
    return folder
