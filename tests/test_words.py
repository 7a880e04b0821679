"""American spelling and the project's terms, over all text of the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["diffmem", "csrc", "tests", "benchmarks", "docs", "examples"]
KINDS = {".py", ".md", ".j2", ".h", ".cpp", ".cu", ".inc"}

# British spelling: the stem, whatever follows.
BRITISH = (
    r"grey|colou?rise|colour|neighbour|behaviour|favour|honour|flavour|labour|rumour|harbour|endeavour|centre|centring|"
    r"metre\b|fibre|theatre|litre|calibre|licence|defence|offence|pretence|analys(?:e[ds]?|ing)\b|catalys[ei]|"
    r"(?:normal|general|optim|initial|regular|real|minim|maxim|recogn|organ|visual|summar|serial|quant|token|penal|local|"
    r"global|parallel|parameter|random|categor|character|emphas|memor|special|standard|stabil|synchron|util|vector|final|"
    r"capital|custom|ideal|neutral|central|factor|linear|discret|symbol|author|apolog|critic|equal|harmon|modern|"
    r"prior|rational|sanit|standard|symmetr|tabul|trivial|weight)is(?:e[ds]?|ing|ation|ations|er|ers)\b|"
    r"(?:label|model|cancel|travel|signal|channel|level|tunnel|total|equal|fuel|dial|pencil|marvel|quarrel)l(?:ed|ing|er)\b|"
    r"whilst|amongst|learnt|spelt|burnt|dreamt|towards|forwards\b|backwards\b|judgement|acknowledgement|"
    r"artefact|cheque|sceptic|manoeuvre|programme\b|fulfil\b|skilful|enrol\b|catalogue|dialogue|ageing|moustache|plough"
)
# What the code said before, and says otherwise now.
FORMER = (
    r"\banew\b|\bin vain\b|passed over\b|fetch(?:es|ed)? it\b|mend or drop|is not here\b|goes on from there|"
    r"averaged weights|network calls|network_calls|write_whole|\btrifle\b|\bhopeless\b|= narrowest\b|\bhold-out\b|"
    r"\b(?:is|was) no copy\b|\b(?:are|were) no copies\b"
)
# Of file and text: what a quoted name, another's interface or the list itself needs.
ALLOWED = [
    ("", r"[\"']grey[\"']"),  # a color as runs and studies have recorded it, and as --color understands it
    ("CHANGELOG.md", r"`network_calls`"),
]


@pytest.fixture(scope="module")
def texts():
    """The lower-case text of each file by its path, without what is allowed there."""
    paths = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    for folder in FOLDERS:
        paths += [path for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
    found = {}
    for path in paths:
        if path.name != Path(__file__).name and not {"results", "hostile", "golden"} & set(path.parts):
            text = path.read_text(encoding="utf-8").lower()
            for name, allowed in ALLOWED:
                text = re.sub(allowed, "", text) if name in ("", path.name) else text
            found[path.relative_to(ROOT)] = text
    return found


def found(pattern, texts):
    """Where the pattern stands."""
    words = re.compile(pattern)
    return [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path, text in texts.items()
        for match in words.finditer(text)
    ]


def test_spelling_is_american(texts):
    assert found(rf"\b(?:un|re|de|pre|mis|non)?(?:{BRITISH})", texts) == []


def test_former_words_are_gone(texts):
    assert found(FORMER, texts) == []


def test_the_patterns_find_words():
    for word in ("neighbours", "normalised", "labelled", "Colours", "centre", "grey", "behaviours", "unlabelled"):
        assert re.search(BRITISH, word.lower()), word
    for word in (
        "neighbors",
        "revised",
        "raised",
        "promised",
        "controlled",
        "called",
        "precise",
        "parameters",
        "equally",
    ):
        assert not re.search(BRITISH, word), word
