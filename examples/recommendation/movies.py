"""Write MovieLens 100k as a table: who rated which film, when, and whether four stars or more; and print baselines.

python examples/recommendation/movies.py ratings.parquet

A rating's own history is in the table, from earlier ratings alone: how many there were of the film and of the person,
and the share of four stars and more among them. A service has these counts where it records ratings.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import csv, parquet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packages import Package

GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
LIKED = 4
"""Stars from which on a rating counts as liked."""
SHRINK = 5
"""Ratings with the mean that a share is moved towards: a single rating says little."""


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
        "rated_at": ratings["timestamp"].to_numpy().astype(np.int64),
        "liked": liked,
    }
    return pyarrow.table(columns)


def history(what: str, key: np.ndarray, liked: np.ndarray) -> dict[str, np.ndarray]:
    """Of each rating: how many with the same key came before it, as a logarithm, and the share that was liked."""
    counts, sums = np.zeros(key.max() + 1), np.zeros(key.max() + 1)
    count, share = np.empty(len(key)), np.empty(len(key))
    for at, (each, one) in enumerate(zip(key.tolist(), liked.tolist(), strict=True)):
        count[at], share[at] = counts[each], (sums[each] + SHRINK * 0.55) / (counts[each] + SHRINK)
        counts[each] += 1
        sums[each] += one
    return {f"{what}_ratings": np.log1p(count).round(4), f"{what}_liked": share.round(4)}


def _read(content: bytes) -> pyarrow.Table:
    """A file of RecBole: `name:type` in the first line, tabs between."""
    options = csv.ParseOptions(delimiter="\t", quote_char=False)
    found = csv.read_csv(io.BytesIO(content), parse_options=options)
    return found.rename_columns([name.partition(":")[0] for name in found.column_names])


def baseline(file: Path) -> dict[str, float]:
    """AUC of a logistic regression on the same parts: each category in a column of its own, numbers in deviations.

    The best of three strengths of regularisation on the validation part counts.
    """
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    from rushhour.data import Columns, load

    data = load(str(file), columns=Columns(target="liked", time="rated_at"), kind="ranking")
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
    found = []
    for strength in (0.01, 0.1, 1.0):
        model = LogisticRegression(C=strength, max_iter=300).fit(*parts["train"])
        scores = {name: roc_auc_score(y, model.decision_function(x)) for name, (x, y) in parts.items()}
        found.append((scores["validation"], scores["test"]))
    validation, test = max(found)
    x, y = parts["test"]
    return {"validation": validation, "test": test, "ratings": len(y), "liked": float(y.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="write what a logistic regression reaches")
    arguments = parser.parse_args()
    found = table()
    parquet.write_table(found, arguments.out)
    print(f"{len(found):,} ratings with {found.num_columns - 2} columns in {arguments.out}")
    if arguments.baseline:
        reached = baseline(arguments.out)
        arguments.baseline.write_text(json.dumps(reached, indent=1))
        print(
            f"logistic regression: AUC {reached['test']:.4f} on {reached['ratings']:,} ratings, the last tenth in time"
        )


if __name__ == "__main__":
    main()
