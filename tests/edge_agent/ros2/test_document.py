"""docs/ros2.md against the tables of the code."""

from __future__ import annotations

import json
import re

from edge_agent.ros2.diagnostics import LEVELS
from edge_agent.ros2.image import IMAGE_REASONS, TAKEN
from edge_agent.ros2.interfaces import PARAMETERS, PUBLISHED, SERVICES, SUBSCRIBED
from edge_agent.ros2.motion import VELOCITY_FIELDS, WAYPOINT_FIELDS
from edge_agent.ros2.stamps import STAMP_REASONS
from tests.test_documents import section

PAGE = "docs/ros2.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of every row of the tables under a heading, without the heads of the tables."""
    lines = re.findall(r"^\|(.+)\|$", section(PAGE, heading), flags=re.MULTILINE)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [
        row
        for i, row in enumerate(cells)
        if not row[0].startswith("---") and cells[i + 1 : i + 2] != [["---"] * len(row)]
    ]


def test_topics():
    expected = [
        [
            f"`{name}`",
            f"`{topic.type}`",
            f"{'reliable' if topic.is_reliable else 'best effort'}, {topic.depth}",
            topic.what,
        ]
        for name, topic in (PUBLISHED | SUBSCRIBED).items()
    ]
    assert rows("Topics") == expected


def test_services():
    assert rows("Services") == [[f"`{name}`", f"`{kind}`", what] for name, (kind, what) in SERVICES.items()]


def test_parameters():
    expected = [[f"`{name}`", f"`{json.dumps(row.default)}`", row.what] for name, row in PARAMETERS.items()]
    assert rows("Parameters") == expected


def test_axes():
    fields = VELOCITY_FIELDS | WAYPOINT_FIELDS
    assert rows("Axes") == [[f"`{name}`", f"`{field}`", f"{factor:g}"] for name, (field, factor) in fields.items()]


def test_reasons():
    assert rows("Time") == [[f"`{reason}`", what] for reason, what in STAMP_REASONS.items()]
    assert rows("Images")[-len(IMAGE_REASONS) :] == [[f"`{reason}`", what] for reason, what in IMAGE_REASONS.items()]


def test_encodings():
    cells = [row[0] for row in rows("Images")[: -len(IMAGE_REASONS)]]
    assert sorted(re.findall(r"`([\w]+)`", " ".join(cells))) == sorted([*TAKEN, "CompressedImage"])


def test_levels():
    (daemon,) = [row for row in rows("Diagnostics") if row[0] == "`daemon`"]
    for state, level in LEVELS.items():
        assert f"`{state}`" in daemon[1 + level], state
