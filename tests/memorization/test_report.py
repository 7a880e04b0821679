"""The report: complete, self-contained, small, and safe whatever the images and their names are."""

import csv
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest

import diffmem
from diffmem.data import ImageSet, SkippedFile
from diffmem.errors import InputError

random = np.random.default_rng(0)


class Page(HTMLParser):
    """Collects what a browser would show and fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.images, self.links, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"])
        if "title" in values:
            self.words.append(values["title"])
        self.links += [
            v for k, v in attributes if k in ("href", "src", "xlink:href") and not v.startswith(("data:", "#"))
        ]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(audit, folder) -> Page:
    return Page(audit.save(folder).read_text())


def test_large_audit_stays_small_and_readable(tmp_path):
    """10,000 noise images, the worst to compress, all of them copies."""
    training = random.integers(0, 256, (150, 3, 32, 32), dtype=np.uint8)
    generated = training[random.integers(0, 150, 10_000)]
    audit = diffmem.audit(generated, training, holdout=random.integers(0, 256, (50, 3, 32, 32), dtype=np.uint8))
    page = page_of(audit, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert "10,000 of 10,000 generated images are copies of training images: 100 %" in page.text
    assert "0 of 50 unseen real images" in page.text
    assert len(page.images) >= 3 * 120
    assert page.links == []
    with open(tmp_path / "samples.csv", newline="") as file:
        assert sum(int(row["memorized"]) for row in csv.DictReader(file)) == 10_000
    assert json.loads((tmp_path / "report.json").read_text())["count"] == 10_000


@pytest.mark.parametrize(
    "images",
    [
        random.integers(0, 256, (12, 3, 600, 500), dtype=np.uint8),  # large
        random.normal(size=(12, 4, 8, 8)).astype(np.float32),  # latents: four channels, floats
        np.full((12, 1, 1, 1), 7, np.uint8) + np.arange(12, dtype=np.uint8).reshape(-1, 1, 1, 1),  # one pixel
        random.uniform(0, 1, (12, 3, 9, 300)).astype(np.float64),  # very wide
    ],
    ids=["large", "latents", "one pixel", "wide"],
)
def test_any_images_can_be_shown(images, tmp_path):
    page = page_of(diffmem.audit(images, images[:10]), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert len(page.images) >= 9
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in page.images)


def test_names_are_text_not_markup(tmp_path):
    hostile = ["<script>alert(1)</script>.png", '"><img src=x onerror=alert(1)>', "naïve 猫.png", "=1+1"]
    hostile += [
        os.fsdecode(b"caf\xe9/\xff.png"),
        "exe\u202egnp.html",
        "two\nlines\x1b[31m.png",
        "a/img.png",
        "b/img.png",
    ]
    images = random.integers(0, 256, (9, 1, 8, 8), dtype=np.uint8)
    images[1] = images[0]
    named = ImageSet(
        images, hostile, source="<b>bold</b>", skipped=(SkippedFile("<i>bad</i>.png", "truncated <file>"),)
    )
    page = page_of(diffmem.audit(named, named), tmp_path)
    assert "script" not in page.tags
    assert hostile[0] in page.text
    assert "<b>bold</b>" in page.text
    assert "<i>bad</i>.png" in page.text
    assert page.links == []
    assert "1 groups" not in page.text
    with open(tmp_path / "samples.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    escaped = ["caf\\xe9/\\xff.png", "exe\\u202egnp.html", "two\\nlines\\x1b[31m.png", "a/img.png", "b/img.png"]
    assert [row[1] for row in rows[1:]] == [*hostile[:3], "'=1+1", *escaped]
    assert all(name in page.text for name in escaped)
    sources = json.loads((tmp_path / "report.json").read_text())["sources"]
    assert hostile[4] in {source["name"] for source in sources}  # JSON keeps names as they are


def test_close_calls_stand_on_both_sides_of_the_threshold(tmp_path):
    training = random.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    steps = np.linspace(0, 1, 300).reshape(-1, 1, 1, 1)  # from one training image to another
    generated = (training[:1] * (1 - steps) + training[1:2] * steps).round().astype(np.uint8)
    page = page_of(diffmem.audit(generated, training), tmp_path)
    after = page.text[page.text.index("Close calls") : page.text.index("Copies, by the training image")]
    apart = after.count("not a copy")
    assert apart == 12
    assert after.count(" copy") - apart >= 12


def test_what_was_there_survives_a_failure(tmp_path, monkeypatch):
    images = random.integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
    audit = diffmem.audit(images, images)
    audit.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(
        "diffmem.memorization.report.write_columns", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(InputError, match="No space left"):
        audit.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
