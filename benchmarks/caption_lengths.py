"""Makes ``caption_lengths.json``: how many captions have how many words, as the text encoder sees them.

    python -m benchmarks.caption_lengths flickr30k/test_caps.txt >benchmarks/caption_lengths.json

The committed file was made so from the test captions of Flickr30k in SCAN's layout (one caption a line, 1,000 images x
5). It holds integers alone, no text.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from itm_pipeline.data.tokenizer import tokenize

START_AND_END = 2


def histogram(captions: Iterable[str]) -> dict[int, int]:
    """Words (tokens, start and end) -> captions that have as many, ascending."""
    counts = Counter(len(tokenize(caption)) + START_AND_END for caption in captions)
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, help="text file, one caption a line")
    path = parser.parse_args().captions
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{path} cannot be read: {error}")
    if not lines:
        parser.error(f"{path} has no captions")
    print(json.dumps(histogram(lines)))


if __name__ == "__main__":
    main()
