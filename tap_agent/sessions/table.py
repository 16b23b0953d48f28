"""Tables of many runs, begun anew or where they were interrupted.

Nothing is kept here: each measurement is in the ledger under its content, and each search in a folder of its own, so
that a table that is asked for again measures what is missing.
"""

from __future__ import annotations

from tap_agent.sessions.costs import costs
from tap_agent.sessions.place import Lines, Place
from tap_agent.sessions.rows import allocations
from tap_agent.sessions.searches import searches
from tap_agent.tables.cited import cited
from tap_agent.tables.line import Line
from tap_agent.tables.plan import Planned

_MEASURING = {"allocations": allocations, "cost": costs, "searches": searches}


def tabulate(planned: Planned, place: Place) -> Lines:
    """The lines of a table so far, again whenever there are more, network by network.

    Figures that are cited and rows that nobody can measure come after those that were measured. Raises a `Mistake`
    where the one network that was asked for cannot be had; of several its line says why.
    """
    absent = [Line(network=each.network, row=each.row, kind="proxy", note=each.why) for each in planned.plan.absent]
    others = [*absent, *cited(planned.plan.cited)]
    for own in _MEASURING[planned.plan.measures](planned, place):
        lines = [*own, *others]
        order = {name: number for number, name in enumerate(dict.fromkeys(line.network for line in lines))}
        yield sorted(lines, key=lambda line: order[line.network])
