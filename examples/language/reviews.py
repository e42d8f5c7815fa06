"""Write short film reviews with the verdict of 20 human raters each, as a table of texts, labels and mean ratings.

python examples/language/reviews.py reviews.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packages import Package

KINDS = {
    "film": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "newspaper": "nytEditorialSnippets_GroundTruth.txt",
}


def read(kind: str) -> list[tuple[str, str, float]]:
    """Texts, `positive` or `negative`, and the mean of the raters, whose sign it is; those at 0 are left out."""
    packed = io.BytesIO(Package("vaderSentiment").read("additional_resources/hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(fileobj=packed) as archive:
        name = next(each for each in archive.getnames() if each.endswith(KINDS[kind]))
        content = archive.extractfile(name).read().decode("latin-1")
    rows = (line.split("\t", 2) for line in content.splitlines() if line.strip())
    rated = [(text.strip(), float(score)) for _, score, text in rows if float(score)]
    return [(text, "positive" if score > 0 else "negative", score) for text, score in rated]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="film")
    arguments = parser.parse_args()
    rows = read(arguments.kind)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "label", "rating"), *rows])
    print(f"{len(rows):,} texts in {arguments.out}")


if __name__ == "__main__":
    main()
