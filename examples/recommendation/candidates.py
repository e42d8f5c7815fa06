"""Ask the server of the example `movies` which of a thousand films a person would like, in one request.

rushhour serve runs/movies/run &
python examples/recommendation/candidates.py http://127.0.0.1:8000 runs/movies/ratings.parquet --user 12
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
import urllib.parse
from pathlib import Path

from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from movies import GENRES, _read
from packages import Package

_OF_FILM = ("item_id", "release_year", *(name.lower() for name in GENRES), "film_ratings", "film_liked")
_MODEL = "movies"


def titles() -> dict[int, str]:
    films = _read(Package("recbole").read("dataset_example/ml-100k/ml-100k.item"))
    return dict(zip(map(int, films["item_id"].to_pylist()), films["movie_title"].to_pylist(), strict=True))


def question(ratings: list[dict[str, object]], user: int, candidates: int) -> dict[str, object]:
    """The person as last seen, and the films that they have not rated, as last seen.

    Raises:
        SystemExit: if the person has no rating.
    """
    own = [row for row in ratings if row["user_id"] == user]
    if not own:
        raise SystemExit(f"there is no person {user}: they are 1 to {max(int(row['user_id']) for row in ratings)}")
    seen = {row["item_id"] for row in own}
    films = {row["item_id"]: row for row in ratings if row["item_id"] not in seen}
    rows = [{name: film[name] for name in _OF_FILM} for film in list(films.values())[:candidates]]
    apart = {*_OF_FILM, "liked", "rated_at"}
    return {"shared": {name: value for name, value in own[-1].items() if name not in apart}, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("ratings", type=Path)
    parser.add_argument("--user", type=int, default=12)
    parser.add_argument("--candidates", type=int, default=1000)
    arguments = parser.parse_args()
    asked = question(parquet.read_table(arguments.ratings).to_pylist(), arguments.user, arguments.candidates)
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(arguments.url).netloc, timeout=30)
    body = json.dumps(asked)
    began = time.perf_counter()
    connection.request("POST", f"/v2/models/{_MODEL}/rows", body, {"content-type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    took = time.perf_counter() - began
    if "error" in answer:
        raise SystemExit(answer["error"])
    scores = [each["score"] for each in answer["answers"]]
    print(f"{len(scores):,} films in {1e3 * took:.1f} ms")
    named = titles()
    best = sorted(zip(scores, asked["rows"], strict=True), key=lambda each: -each[0])[:10]
    for score, row in best:
        print(f"{score:.3f}  {named[row['item_id']]}")


if __name__ == "__main__":
    main()
