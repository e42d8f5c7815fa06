"""The report of a compression."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from runs import compressed

from rushhour.report import charts, write_compression_report


def test_the_report_of_a_compression_has_no_empty_rows_and_stars_one_step(tmp_path: Path) -> None:
    """Each recipe began with a row that said its name and nothing else; equal stages had a star each."""
    compressed((1, 0)).save(tmp_path)
    page = write_compression_report(tmp_path).read_text()
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]
    assert len(rows) == 5, "the reference, three steps, and the unfinished recipe"
    assert all(len(row) > 4 for row in rows)
    assert [row.count("★") for row in rows] == [0, 0, 1, 0, 0]
    assert "not changed: stem (stem is frozen)" in page
    assert "not finished: nothing of mine can be pruned" in page
    confirmed = page[page.index("Confirmed on the test part") :]
    assert "within 5%" in confirmed
    assert "they are no numbers" in confirmed


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("step", ["int8", "prune:0.3:epochs=1:round_to=4"])
@pytest.mark.parametrize("best", [(0, 0), (1, 1)])
def test_the_chart_of_sizes_has_room_for_its_axes(best: tuple[int, int], step: str, narrow: bool) -> None:
    """A long name of a step left none on a phone: matplotlib warns, and a warning is an error here."""
    found = compressed(best)
    attempts = tuple(
        msgspec.structs.replace(each, stages=tuple(msgspec.structs.replace(one, step=step) for one in each.stages))
        for each in found.attempts
    )
    assert charts.compression_sizes(msgspec.structs.replace(found, attempts=attempts), narrow) is not None
