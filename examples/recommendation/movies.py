"""Write MovieLens 100k as a table: who rated which film, when, and whether four stars or more; and print baselines.

python examples/recommendation/movies.py ratings.parquet

What was known when a rating was given is in its row, from earlier ratings alone: how many there were of the film and of
the person, the share that was liked, and by genre how much more the person liked films of it than others do. A service
has such counts where it records ratings.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import csv, parquet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packages import Package

from rushhour.data import Columns, load

GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
LIKED = 4
"""Stars from which on a rating counts as liked."""
SHRINK, USUAL = 5, 0.55
"""Ratings of the usual share that a share is moved towards: a single rating says little."""


def table() -> pyarrow.Table:
    """A row for each rating, in the order of time."""
    folder = "dataset_example/ml-100k/ml-100k"
    files = Package("recbole").read_all([f"{folder}.{each}" for each in ("inter", "user", "item")])
    ratings, people, films = map(_read, files.values())
    order = np.argsort(ratings["timestamp"].to_numpy(), kind="stable")
    ratings = ratings.take(order)
    user, item = (ratings[name].to_numpy().astype(int) for name in ("user_id", "item_id"))
    liked = (ratings["rating"].to_numpy() >= LIKED).astype(int)
    of_user = {int(number): row for row, number in enumerate(people["user_id"].to_pylist())}
    of_item = {int(number): row for row, number in enumerate(films["item_id"].to_pylist())}
    people = people.take([of_user[each] for each in user.tolist()])
    films = films.take([of_item[each] for each in item.tolist()])
    genres = [set(str(each).split()) for each in films["class"].to_pylist()]
    columns = {
        "user_id": user,
        "item_id": item,
        "age": people["age"].to_numpy().astype(int),
        "gender": people["gender"],
        "occupation": people["occupation"],
        "release_year": pyarrow.array(
            [int(each) if str(each).isdecimal() else None for each in films["release_year"].to_pylist()]
        ),
        **{name.lower(): [int(name in each) for each in genres] for name in GENRES},
        **history("film", item, liked),
        **history("person", user, liked),
        **tastes(user, genres, liked),
        "rated_at": ratings["timestamp"].to_numpy().astype(np.int64),
        "liked": liked,
    }
    return pyarrow.table(columns)


def history(what: str, key: np.ndarray, liked: np.ndarray) -> dict[str, np.ndarray]:
    """Of each rating: how many with the same key came before it, as a logarithm, and the share that was liked."""
    counts, sums = np.zeros(key.max() + 1), np.zeros(key.max() + 1)
    count, share = np.empty(len(key)), np.empty(len(key))
    for at, (each, one) in enumerate(zip(key.tolist(), liked.tolist(), strict=True)):
        count[at], share[at] = counts[each], (sums[each] + SHRINK * USUAL) / (counts[each] + SHRINK)
        counts[each] += 1
        sums[each] += one
    return {f"{what}_ratings": np.log1p(count).round(4), f"{what}_liked": share.round(4)}


def tastes(user: np.ndarray, genres: list[set[str]], liked: np.ndarray) -> dict[str, np.ndarray]:
    """Of each rating and genre: what the person's earlier ratings of films of it were above the usual share."""
    place = {name: at for at, name in enumerate(GENRES)}
    counts, sums = np.zeros((user.max() + 1, len(GENRES))), np.zeros((user.max() + 1, len(GENRES)))
    found = np.empty((len(user), len(GENRES)))
    for at, (each, one) in enumerate(zip(user.tolist(), liked.tolist(), strict=True)):
        found[at] = sums[each] / (counts[each] + SHRINK)
        own = [place[name] for name in genres[at] if name in place]
        counts[each, own] += 1
        sums[each, own] += one - USUAL
    return {f"likes_{name.lower()}": found[:, at].round(4) for at, name in enumerate(GENRES)}


def _read(content: bytes) -> pyarrow.Table:
    """A file of RecBole: `name:type` in the first line, tabs between."""
    options = csv.ParseOptions(delimiter="\t", quote_char=False)
    found = csv.read_csv(io.BytesIO(content), parse_options=options)
    return found.rename_columns([name.partition(":")[0] for name in found.column_names])


def parts_of(file: Path) -> Any:
    """The table as Rushhour reads and splits it: the last tenth in time is the test part."""
    return load(str(file), columns=Columns(target="liked", time="rated_at", group="user_id", categories="user_id"),
                kind="ranking")  # fmt: skip


def baseline(data: Any) -> dict[str, Any]:
    """Scores of a logistic regression on the same columns, with a column for each category and numbers in deviations.

    The best of two strengths of regularisation on the validation part counts.
    """
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression

    table, scaled = data.preprocessing.table, data.preprocessing
    parts = {}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        blocks = []
        for place, column in enumerate(table.columns):
            values = split.inputs[:, place]
            if column.kind == "category":
                rows = np.arange(len(values)), values.astype(int)
                blocks.append(csr_matrix((np.ones(len(values)), rows), shape=(len(values), column.size)))
            else:
                blocks.append(csr_matrix(((values - scaled.mean[place]) / scaled.std[place])[:, None]))
        parts[name] = hstack(blocks).tocsr(), split.targets[:, 0]
    best: tuple[float, Any] = (0.0, None)
    for strength in (0.01, 0.1):
        model = LogisticRegression(C=strength, max_iter=1000).fit(*parts["train"])
        x, y = parts["validation"]
        best = max(best, (auc(model.decision_function(x), y), model), key=lambda each: each[0])
    return best[1].decision_function(parts["test"][0])


def auc(scores: np.ndarray, liked: np.ndarray) -> float:
    """The share of pairs of a liked and another rating that are in the right order (Mann and Whitney, 1947)."""
    order = np.argsort(scores, kind="stable")
    _, first, count = np.unique(scores[order], return_index=True, return_counts=True)
    ranks = np.empty(len(scores))
    ranks[order] = np.repeat(first + (count + 1) / 2, count)
    wanted = liked > 0.5
    pairs = wanted.sum() * (~wanted).sum()
    return float((ranks[wanted].sum() - wanted.sum() * (wanted.sum() + 1) / 2) / max(1, pairs))


def judge(file: Path, run: Path, out: Path) -> None:
    """Compare the served graph with logistic regression on the test part, and write `figures.json`."""
    import onnxruntime

    from rushhour.bundle import Bundle
    from rushhour.plan import Plan

    plan = Plan.load(run / "plan.json")
    bundle = Bundle.open(run / plan.variants[0].bundle)
    data = parts_of(file)
    test = data.test
    session = onnxruntime.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    own = session.run(None, {session.get_inputs()[0].name: test.inputs})[0][:, 0]
    plain, liked = baseline(data), test.targets[:, 0]
    _, person = np.unique(test.groups, return_inverse=True)
    rows = [np.flatnonzero(person == each) for each in range(person.max() + 1)]
    random = np.random.default_rng(0)
    gains = []
    for _ in range(500):
        drawn = np.concatenate([rows[each] for each in random.integers(0, len(rows), len(rows))])
        gains.append(auc(own[drawn], liked[drawn]) - auc(plain[drawn], liked[drawn]))
    low, high = np.quantile(gains, [0.025, 0.975])
    found = auc(own, liked), auc(plain, liked)
    what = f"AUC {found[0]:.4f}, {found[1]:.4f} by logistic regression on the same columns and parts"
    checks = [
        {
            "id": "1.movies.gain", "what": f"MovieLens split in time: {what}: the difference, by person", "unit": "AUC",
            "target": "> 0", "value": found[0] - found[1], "interval": [float(low), float(high)], "n": len(liked),
            "holds": bool(low > 0), "why": "" if low > 0 else "the interval of the difference holds 0",
        }
    ]  # fmt: skip
    out.write_text(json.dumps(checks, indent=1))
    print(f"{what}: {found[0] - found[1]:.4f} more ({low:.4f} to {high:.4f}, by {len(rows)} persons)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--run", type=Path, help="judge the Plan of this run, and write figures.json beside it")
    arguments = parser.parse_args()
    if arguments.run:
        judge(arguments.file, arguments.run, arguments.run.parent / "figures.json")
        return
    found = table()
    parquet.write_table(found, arguments.file)
    print(f"{len(found):,} ratings with {found.num_columns - 2} columns in {arguments.file}")
    data = parts_of(arguments.file)
    print(f"logistic regression: AUC {auc(baseline(data), data.test.targets[:, 0]):.4f} on the last tenth in time")


if __name__ == "__main__":
    main()
