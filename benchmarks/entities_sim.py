"""Real captions and phrase boxes with simulated region features, in the layouts that the pipeline reads.

    python -m benchmarks.entities_sim entities_val.jsonl.gz OUT [--split train=0:780 dev=780:880 test=880:] [--dim 512]

Reads one image a line: `{"image", "captions": [5], "phrases": [{"phrase", "box": [x1, y1, x2, y2], "cap", "start",
"end"}]}` with boxes in 1-based pixels and character spans, which is what joining Flickr30K Entities (Plummer et al.
2017) to the captions of Flickr30k gives. Writes, for each split,

    OUT/{split}_ims.npy        float32 [N, 36, dim]   region features, one row per image
    OUT/{split}_caps.txt       5 lines per image
    OUT/{split}_ids.txt        image id, once per caption
    OUT/{split}_ims_bbx.npy    float32 [N, 36, 4]     x1 y1 x2 y2 in 0-based pixels
    OUT/{split}_ims_size.npy   int64 [N, 2]           height, width (the envelope of the boxes: true sizes are unknown)
    OUT/Sentences/ID.txt       Flickr30K Entities markup: [/EN#chain/type words]; type is always 'other'
    OUT/Annotations/ID.xml     one <object> per chain, 1-based pixels

What is simulated: a region's feature is relu(P z), z the normalised sum of one fixed random vector per content word of
every phrase that points at its box, plus noise. A jittered proposal mixes its box's z with noise by its IoU; the rest
of the 36 regions are distractors made of words that this image's phrases do not contain. A word's vector depends on the
word alone, so every set made with one --dim shares one visual world. Scores on this data say how a model learns from
real captions and real boxes; they do not compare with any published table.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

REGIONS = 36
PROJECTION_SEED = 1234
STOP = re.compile("a|an|the|of|in|on|at|to|and|or|with|his|her|their|its|some|two|three|four|five|several|many|s")

Array = npt.NDArray[Any]


def content_words(phrase: str) -> tuple[str, ...]:
    """Words that say what is seen, in the singular; all words where none does."""
    words = re.findall(r"[a-z]+", phrase.lower())
    kept = [
        w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words if not STOP.fullmatch(w)
    ]
    return tuple(dict.fromkeys(kept or words))


@functools.cache
def word_vector(word: str, dim: int) -> Array:
    """A word's fixed direction [dim]."""
    vector: Array = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(dim)
    vector /= np.linalg.norm(vector)
    return vector


def unit(vector: Array) -> Array:
    """Length 1."""
    scaled: Array = vector / (np.linalg.norm(vector) + 1e-8)
    return scaled


def iou(a: Array, b: Array) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(inter / (areas[0] + areas[1] - inter + 1e-9))


def regions_of(
    image: dict[str, Any], vocabulary: list[str], dim: int, rng: np.random.Generator, noise: float
) -> tuple[Array, Array, tuple[int, int]]:
    """Latents [36, dim], boxes [36, 4] and (height, width) of an image."""
    chains: dict[tuple[int, ...], set[str]] = {}
    for phrase in image["phrases"]:
        chains.setdefault(tuple(phrase["box"]), set()).update(content_words(phrase["phrase"]))
    width = max([box[2] for box in chains] + [100]) + 1
    height = max([box[3] for box in chains] + [100]) + 1
    said = set().union(*chains.values()) if chains else set()
    latents: list[Array] = []
    boxes: list[Array] = []
    order = list(chains)
    rng.shuffle(order)
    for copy in range(3):
        for chain in order:
            if len(latents) >= REGIONS - 8:
                break
            z = unit(sum((word_vector(word, dim) for word in sorted(chains[tuple(chain)])), np.zeros(dim)))
            true = np.array(chain, float) - 1  # the source counts pixels from 1
            box = true
            if copy:
                span = np.array([box[2] - box[0], box[3] - box[1]] * 2)
                box = box + rng.uniform(-0.18, 0.18, 4) * span
                box = np.array([max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)])
            keep = iou(box, true)
            other = unit(rng.standard_normal(dim))
            latents.append(unit(keep * z + (1 - keep) * other + noise * unit(rng.standard_normal(dim))))
            boxes.append(box)
    while len(latents) < REGIONS:
        words = [word for word in rng.choice(vocabulary, 4) if word not in said][:2]
        z = sum((word_vector(word, dim) for word in words), np.zeros(dim))
        latents.append(unit(unit(z) + noise * unit(rng.standard_normal(dim))))
        x, y = rng.uniform(0, 0.8 * width), rng.uniform(0, 0.8 * height)
        right = x + rng.uniform(0.05, 0.2) * width
        boxes.append(np.array([x, y, right, y + rng.uniform(0.05, 0.2) * height]))
    shuffle = rng.permutation(REGIONS)
    return np.array(latents)[shuffle], np.array(boxes, np.float32)[shuffle], (height, width)


def write_entities(image: dict[str, Any], size: tuple[int, int], out: Path) -> None:
    """The image's markup and boxes in Flickr30K Entities' layout."""
    stem = Path(image["image"]).stem
    chain: dict[tuple[int, ...], int] = {}
    for phrase in image["phrases"]:
        chain.setdefault(tuple(phrase["box"]), len(chain) + 1)
    lines = []
    for index, caption in enumerate(image["captions"]):
        here = [p for p in image["phrases"] if p.get("cap") == index and "start" in p]
        text, at = "", 0
        for start, end, number in sorted((p["start"], p["end"], chain[tuple(p["box"])]) for p in here):
            if start < at:
                continue
            text += f"{caption[at:start]}[/EN#{number}/other {caption[start:end]}]"
            at = end
        lines.append(text + caption[at:])
    (out / "Sentences" / f"{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{int(box[0])}</xmin><ymin>{int(box[1])}</ymin>"
        f"<xmax>{int(box[2])}</xmax><ymax>{int(box[3])}</ymax></bndbox></object>"
        for box, name in chain.items()
    )
    (out / "Annotations" / f"{stem}.xml").write_text(
        f"<annotation><filename>{escape(image['image'])}</filename><size><width>{size[1]}</width>"
        f"<height>{size[0]}</height><depth>3</depth></size>{objects}</annotation>\n",
        encoding="utf-8",
    )


def write_split(
    name: str, part: list[dict[str, Any]], made: list[tuple[Array, Array, tuple[int, int]]], out: Path
) -> None:
    """Features, captions, ids, boxes and sizes of a split, from what `regions_of` made."""
    latents = np.stack([latent for latent, _, _ in made])
    dim = latents.shape[-1]
    projection = np.random.default_rng(PROJECTION_SEED).standard_normal((dim, dim)) / np.sqrt(dim)
    features = (latents.reshape(-1, dim) @ projection.T).reshape(latents.shape)  # 2-D: a stacked matmul is slow
    features = np.maximum(features * np.sqrt(dim), 0).astype(np.float32)
    np.save(out / f"{name}_ims.npy", features)
    np.save(out / f"{name}_ims_bbx.npy", np.stack([boxes for _, boxes, _ in made]))
    np.save(out / f"{name}_ims_size.npy", np.array([size for _, _, size in made], np.int64))
    captions = "".join(caption.strip() + "\n" for image in part for caption in image["captions"])
    (out / f"{name}_caps.txt").write_text(captions, encoding="utf-8")
    ids = "".join(f"{Path(image['image']).stem}\n" * 5 for image in part)
    (out / f"{name}_ids.txt").write_text(ids, encoding="utf-8")
    print(f"{name}: {len(part)} images, {5 * len(part)} captions, features {features.shape}")


def main() -> None:
    """Read the arguments, write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jsonl", nargs="+", help="gzipped JSON lines")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", nargs="+", default=["train=0:780", "dev=780:880", "test=880:"])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.35, help="length of the noise on a unit latent; 0.7 is hard")
    args = parser.parse_args()
    images = []
    for path in args.jsonl:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            images += [json.loads(line) for line in lines]
    images = [image for image in images if len(image.get("captions") or ()) == 5]
    vocabulary = sorted({word for image in images for p in image["phrases"] for word in content_words(p["phrase"])})
    rng = np.random.default_rng(args.seed)
    for folder in ("Sentences", "Annotations"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    for spec in args.split:
        name, _, span = spec.partition("=")
        start, _, stop = span.partition(":")
        part = images[int(start or 0) : int(stop) if stop else None]
        made = [regions_of(image, vocabulary, args.dim, rng, args.noise) for image in part]
        write_split(name, part, made, args.out)
        for image, (_, _, size) in zip(part, made, strict=True):
            write_entities(image, size, args.out)


if __name__ == "__main__":
    main()
