"""Ask the server of the example `storms` where a storm is in 24 hours: by default Laura, the day before its landfall.

rushhour serve runs/storms/run &
python examples/science/forecast.py http://127.0.0.1:8000 runs/storms/storms/test.csv --storm "Laura 2020"
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import urllib.parse
from pathlib import Path

from pyarrow import csv

_KM_PER_DEGREE = 111.195
_MODEL = "storms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("table", type=Path)
    parser.add_argument("--storm", default="Laura 2020")
    arguments = parser.parse_args()
    rows = [row for row in csv.read_csv(arguments.table).to_pylist() if row["storm"] == arguments.storm]
    if not rows:
        raise SystemExit(f"{arguments.table} has no storm {arguments.storm!r}: name and year, such as 'Laura 2020'")
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(arguments.url).netloc, timeout=30)
    # the rows go as they are: the server ignores the targets and the group, which they have too
    connection.request("POST", f"/v2/models/{_MODEL}/rows", json.dumps({"rows": rows}))
    answer = json.loads(connection.getresponse().read())
    if "error" in answer:
        raise SystemExit(answer["error"])
    print("hours  now            in 24 hours    error    wind, forecast and true")
    for row, each in zip(rows, answer["answers"], strict=True):
        said = each["values"]
        latitude = row["latitude"] + said["north_km"] / _KM_PER_DEGREE
        mean = math.radians((latitude + row["latitude"]) / 2)
        longitude = row["longitude"] + said["east_km"] / (_KM_PER_DEGREE * math.cos(mean))
        gap = math.hypot(said["north_km"] - row["north_km"], said["east_km"] - row["east_km"])
        wind = [row["wind_kt"] + change for change in (said["wind_change_kt"], row["wind_change_kt"])]
        print(
            f"{row['hours_old']:5}  {row['latitude']:5.1f} {row['longitude']:6.1f}   {latitude:5.1f} {longitude:6.1f} "
            f"  {gap:4.0f} km  {wind[0]:3.0f} kt, {wind[1]:3.0f} kt"
        )


if __name__ == "__main__":
    main()
