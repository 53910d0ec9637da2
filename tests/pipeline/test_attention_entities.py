"""Files of Flickr30K Entities: what they say, word by word and box by box, and what happens with those that harm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from itm_pipeline.data import PrecompSplit, tokenize
from itm_pipeline.entities import overlaps, read_words
from itm_pipeline.entities.alignment import align
from itm_pipeline.entities.annotations import read_boxes
from itm_pipeline.entities.sentences import parse, read_sentences
from itm_pipeline.errors import UserError

# The captions


def test_marks_are_taken_out_and_remembered() -> None:
    sentence = parse("[/EN#7/people/other A man] in [/EN#0/notvisual it] holds[/EN#12/bodyparts  an arm].", "here")
    assert sentence.text == "A man in it holds an arm."
    assert [sentence.text[p.start : p.end] for p in sentence.phrases] == ["A man", "it", " an arm"]
    assert [p.chain for p in sentence.phrases] == ["7", "0", "12"]
    assert [p.types for p in sentence.phrases] == [("people", "other"), ("notvisual",), ("bodyparts",)]


def test_brackets_that_are_no_marks_stay() -> None:
    sentence = parse("a [sign] says [/EN#3/other STOP] :-] [/en#", "here")
    assert sentence.text == "a [sign] says STOP :-] [/en#"
    assert len(sentence.phrases) == 1


@pytest.mark.parametrize(
    "line",
    [
        "[/EN#7/people A man in a hat",
        "[/EN#7/people A [/EN#8/people man] ]",
        "[/EN#seven/people A man]",
        "[/EN#7 A man]",
        "[/EN#7/ A man]",
        "[/EN#/people A man]",
        "[/EN#7/people]",
        f"[/EN#{'7' * 19}/people A man]",
    ],
)
def test_broken_marks_are_told(line: str) -> None:
    with pytest.raises(UserError, match=r"^f\.txt line 2: .* is no mark of Flickr30K Entities"):
        parse(line, "f.txt line 2")


def test_a_mark_without_words_is_told() -> None:
    with pytest.raises(UserError, match=r"^f\.txt line 2: the mark of chain 7 holds no words"):
        parse("[/EN#7/people  ]", "f.txt line 2")


@pytest.mark.parametrize("line", ["[/EN#1" * 200_000, "[/EN#1" + "/a" * 500_000, "[/EN#1/a " + "b " * 500_000])
def test_long_lines_take_no_longer_than_they_are(line: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match="is no mark"):
        parse(line, "here")
    assert time.process_time() - start < 5


def test_captions_have_lines(tmp_path: Path) -> None:
    path = tmp_path / "1.txt"
    path.write_text("[/EN#1/other a cat]\n[/EN#2/other a dog\n")
    with pytest.raises(UserError, match=r"1\.txt line 2: '\[/EN#2/other a dog' is no mark"):
        read_sentences(path)
    path.write_bytes(b"a cat\n\xff\n")
    with pytest.raises(UserError, match=r"1\.txt line 2: not UTF-8"):
        read_sentences(path)
    path.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(UserError, match=r"1\.txt: has 1,048,577 bytes"):
        read_sentences(path)
    with pytest.raises(UserError, match=r"2\.txt: no such file; give the folder that holds Sentences/"):
        read_sentences(tmp_path / "2.txt")
    with pytest.raises(UserError, match="is not a file"):
        read_sentences(tmp_path)


# Words of one tokeniser in the text of another


def aligned(marked: str, caption: str) -> list[tuple[str, str]]:
    """Token and chain of every word that was found."""
    tokens = tokenize(caption)
    return [(tokens[token], phrase.chain) for token, phrase in align(parse(marked, "E"), caption, "E", "C")]


def test_words_are_found_by_their_letters() -> None:
    marked = "[/EN#1/people The dark-haired man] in [/EN#2/clothing a red , dry hat] waves ."
    caption = "the dark-haired man in a red, dry hat waves."
    assert aligned(marked, caption) == [
        ("the", "1"), ("dark-haired", "1"), ("man", "1"), ("a", "2"), ("red", "2"), ("dry", "2"), ("hat", "2"),
    ]  # fmt: skip


def test_a_word_that_the_tokeniser_splits_is_several() -> None:
    assert aligned("[/EN#1/people the man's] cannot see", "The man's cannot see") == [
        ("the", "1"), ("man", "1"), ("'s", "1"),
    ]  # fmt: skip
    assert aligned("he [/EN#4/other cannot] swim", "he cannot swim") == [("can", "4"), ("not", "4")]
    assert aligned("[/EN#1/people A&M] plays", "A&M plays") == [("a", "1"), ("m", "1")]


def test_words_that_the_tokeniser_joins_are_one() -> None:
    # Entities mark a part of what is one word to the model: the word belongs to both phrases.
    marked = "[/EN#1/other blue]-[/EN#2/other green] [/EN#3/other Clyde 's Farm]"
    assert aligned(marked, "blue-green Clyde's Farm") == [
        ("blue-green", "1"), ("blue-green", "2"), ("clyde", "3"), ("'s", "3"), ("farm", "3"),
    ]  # fmt: skip


def test_signs_and_capitals_may_differ() -> None:
    assert aligned('[/EN#1/other a " STOP " sign] .', "A ``stop'' sign") == [("a", "1"), ("stop", "1"), ("sign", "1")]
    assert aligned("[/EN#1/other İstanbul] [/EN#2/other straße]", "i̇stanbul STRAßE") == [
        ("i̇stanbul", "1"), ("straße", "2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a man in a cap", "letter 8 begins 'hat' in the one, 'cap' in the other"),
        ("a man in a", "letter 8 begins 'hat' in the one, nothing in the other"),
        ("a man in a hats", "letter 11 begins nothing in the one, 's' in the other"),
    ],
)
def test_other_letters_are_told_with_image_and_line(caption: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        align(parse("[/EN#1/people a man] in a hat", "E"), caption, "Sentences/17.txt line 3", "test_caps.txt line 13")
    told = "Sentences/17.txt line 3 and test_caps.txt line 13 are not the same caption: "
    assert str(raised.value).startswith(told + message)


# The boxes


def written(path: Path, objects: str, head: str = "") -> Path:
    path.write_text(f"{head}<annotation><filename>1.jpg</filename>{objects}</annotation>")
    return path


def box(*sides: object) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    return "<bndbox>" + "".join(f"<{n}>{s}</{n}>" for n, s in zip(names, sides, strict=True)) + "</bndbox>"


def test_boxes_of_chains(tmp_path: Path) -> None:
    objects = (
        f"<object><name>7</name>{box(1, 2, 30, 40)}</object>"
        f"<object><name>8</name><name>7</name>{box(5, 6, 7, 8)}</object>"
        "<object><name>9</name><scene>1</scene><nobndbox>0</nobndbox></object>"
        "<object><name>10</name><scene>0</scene><nobndbox>1</nobndbox></object>"
        f"<object> <name> 11 </name> {box(' 3.5 ', 4, 3.5, 9)} <scene>0</scene></object>"
    )
    boxes = read_boxes(written(tmp_path / "1.xml", objects))
    assert {chain: found.tolist() for chain, found in boxes.items()} == {
        "7": [[0, 1, 29, 39], [4, 5, 6, 7]],
        "8": [[4, 5, 6, 7]],
        "11": [[2.5, 3, 2.5, 8]],
    }


def test_overlaps_by_hand() -> None:
    one = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30], [4, 4, 4, 9]])
    other = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10]])
    assert overlaps(one, other).tolist() == [[1, 1 / 3, 0], [0.5, 0.2, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (f"<object>{box(1, 2, 3, 4)}</object>", "object 1: must have names that are numbers of chains, got []"),
        (
            "<object>" + "<name>1</name><name>2</name>" * 60 + box(1, 2, 3, 4) * 5_001 + "</object>",
            "object 1: puts more than 10000 boxes into chains",
        ),
        (f"<object><name>man</name>{box(1, 2, 3, 4)}</object>", "object 1: must have names that are numbers of chains"),
        (f"<object><name>1</name>{box(1, 2, 3, 'x')}</object>", "object 1: a box must have the numbers xmin, ymin"),
        (f"<object><name>1</name>{box(1, 2, 3, 'nan')}</object>", "object 1: a box must have the numbers"),
        (f"<object><name>1</name>{box(1, 2, 3, '9' * 5000)}</object>", "object 1: a box must have the numbers"),
        (f"<object><name>1</name>{box(1, 2, 3, '')}</object>", "object 1: a box must have the numbers"),
        ("<object><name>1</name><bndbox><xmin>1</xmin></bndbox></object>", "object 1: a box must have the numbers"),
        (
            f"<object><name>1</name>{box(1, 2, 3, 4)}</object><object><name>2</name>{box(5, 2, 3, 4)}</object>",
            "object 2: a box must not end before it begins, got 5, 2, 3, 4",
        ),
    ],
    ids=str,
)
def test_objects_that_are_wrong_are_told(objects: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "1.xml", objects)
    with pytest.raises(UserError) as raised:
        read_boxes(path)
    assert str(raised.value).startswith(f"{path} {message}")
    assert len(str(raised.value)) < 400 + len(str(path))


LAUGHS = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
HOSTILE: dict[str, tuple[str, str]] = {
    "entities that expand": (
        f'<!DOCTYPE x [<!ENTITY e0 "ha">{LAUGHS}]><annotation>&e11;</annotation>', "declares a DTD or an entity"
    ),
    "one large entity, often": (
        f'<!DOCTYPE x [<!ENTITY a "{"a" * 50_000}">]><annotation>{"&a;" * 50_000}</annotation>',
        "declares a DTD or an entity",
    ),
    "a file of the host": (
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><annotation><object><name>&a;</name></object>'
        "</annotation>",
        "declares a DTD or an entity",
    ),
    "a page of the web": (
        '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>', "declares a DTD or an entity"
    ),
    "a parameter entity": (
        '<!DOCTYPE x [<!ENTITY % a SYSTEM "http://127.0.0.1:9/x"> %a;]><annotation/>', "declares a DTD or an entity"
    ),
    "a plain DTD": ("<!DOCTYPE annotation><annotation/>", "declares a DTD or an entity"),
    "an unknown entity": ("<annotation>&nbsp;</annotation>", "no well-formed XML"),
    "cut off": ("<annotation><object><name>1", "no well-formed XML"),
    "two roots": ("<annotation/><annotation/>", "no well-formed XML"),
    "nothing": ("", "no well-formed XML"),
    "no XML": ("{}", "no well-formed XML"),
    "an unknown encoding": ('<?xml version="1.0" encoding="klingon"?><annotation/>', "no well-formed XML"),
    "a wrong encoding": ('<?xml version="1.0" encoding="utf-16"?><annotation/>', "no well-formed XML"),
    "a null": ("<annotation>\0</annotation>", "no well-formed XML"),
    "a page": ("<html><body>404</body></html>", "starts with <html>"),
    "a namespace": ('<annotation xmlns="urn:x"/>', "starts with <{urn:x}annotation>"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_xml_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*given: Any, **options: Any) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr("socket.socket.connect", reached)
    content, message = HOSTILE[name]
    path = tmp_path / "1.xml"
    path.write_text(content)
    start = time.process_time()
    with pytest.raises(UserError) as raised:
        read_boxes(path)
    assert time.process_time() - start < 5
    assert str(raised.value).startswith(f"{path}: {message}")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300 + len(str(path))


def test_large_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "1.xml"
    with path.open("wb") as file:
        file.truncate(2**34)  # a hole, of no room on the disk
    with pytest.raises(UserError, match=r"1\.xml: has 17,179,869,184 bytes, more than the 1,048,576"):
        read_boxes(path)


def test_deep_nesting_does_no_harm(tmp_path: Path) -> None:
    depth = 100_000
    inside = "<a>" * depth + "</a>" * depth
    boxes = read_boxes(written(tmp_path / "1.xml", f"{inside}<object><name>1</name>{box(1, 1, 2, 2)}</object>"))
    assert boxes["1"].tolist() == [[0, 0, 1, 1]]


# A whole set


def write_set(folder: Path, ids: list[str]) -> Path:
    """Two images with two captions each, their regions and annotations."""
    (folder / "Sentences").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    np.save(folder / "test_ims.npy", np.ones((4, 3, 2), dtype=np.float32))
    (folder / "test_caps.txt").write_text("A man's red hat .\nthere is a hat\na dog, a dog\nThe park\n")
    (folder / "test_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    sentences = {
        "11": "[/EN#1/people A man] 's [/EN#2/clothing red hat] .\n[/EN#0/notvisual there] is [/EN#2/clothing a hat]\n",
        "12": "[/EN#3/animals a dog] , [/EN#4/animals a dog]\n[/EN#5/scene The park]\n",
    }
    objects = {
        "11": f"<object><name>1</name>{box(1, 1, 11, 11)}</object><object><name>2</name>{box(3, 1, 5, 3)}</object>",
        "12": f"<object><name>3</name><name>4</name>{box(1, 1, 3, 3)}</object><object><name>4</name>{box(5, 5, 9, 9)}"
        "</object><object><name>5</name><scene>1</scene><nobndbox>0</nobndbox></object>",
    }
    for name in ("11", "12"):
        (folder / "Sentences" / f"{name}.txt").write_text(sentences[name])
        written(folder / "Annotations" / f"{name}.xml", objects[name])
    return folder


IDS = ["11", "11", "12", "12"]


@pytest.mark.parametrize("ids", [IDS, [f"{i}.jpg" for i in IDS]], ids=["numbers", "pictures"])
def test_words_of_a_split(ids: list[str], tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", ids)
    words = read_words(folder, PrecompSplit(folder, "test"))
    found = [[(word.token, word.chain, word.boxes.tolist()) for word in caption.boxed] for caption in words]
    man, hat = [[0, 0, 10, 10]], [[2, 0, 4, 2]]
    assert found == [
        [(0, "1", man), (1, "1", man), (3, "2", hat), (4, "2", hat)],  # token 2 is 's, of no phrase
        [(2, "2", hat), (3, "2", hat)],  # "there" is not visual
        [(0, "3", [[0, 0, 2, 2]]), (1, "3", [[0, 0, 2, 2]])]
        + [(t, "4", [[0, 0, 2, 2], [4, 4, 8, 8]]) for t in (3, 4)],  # token 2 is the comma
        [],
    ]
    assert [caption.without_box for caption in words] == [0, 0, 0, 2]


def test_sets_that_do_not_fit_are_told(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", IDS)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            read_words(folder, PrecompSplit(folder, "test"))

    sentences = folder / "Sentences" / "12.txt"
    kept = sentences.read_text()
    sentences.write_text(kept.replace("dog]\n", "cat]\n"))
    refused(r"Sentences/12\.txt line 1 and .*test_caps\.txt line 3 are not the same caption: letter 6 begins 'cat'")
    sentences.write_text(kept + "one more\n")
    refused(r"Sentences/12\.txt: has 3 captions, test_caps\.txt has 2 of image 12")
    sentences.write_text(kept)
    (folder / "Annotations" / "11.xml").unlink()
    refused(r"Annotations/11\.xml: no such file")
    for name in ("../set/11", "..", "a\\b", "/etc/passwd", ".jpg"):
        (folder / "test_ids.txt").write_text("".join(f"{i}\n" for i in [name, name, "12", "12"]))
        refused(r"test_ids\.txt: the image id .* is no name of a file")
    (folder / "test_ids.txt").unlink()
    with pytest.raises(UserError, match=r"test_ids\.txt is missing"):
        read_words(folder, PrecompSplit(folder, "test", captions_per_image=2))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_words(tmp_path / "nowhere", PrecompSplit(folder, "test", captions_per_image=2))
