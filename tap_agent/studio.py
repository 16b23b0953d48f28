"""The search graph for `langgraph dev`: the default run, its checkpoints kept by the server.

Nothing is opened before the first node runs, so the graph is there at once. Give it any
input, `{"generation": 0}` say. A search that ends leaves a run folder, like one of the
command line.
"""

from __future__ import annotations

import uuid

from graphs.search import Search
from graphs.state import SearchState
from tap_agent import RUNS
from tap_agent.folder import RunFolder
from tap_agent.session import conclude_run
from tap_agent.settings import Settings
from tap_agent.workshop import Workshop, cache_folder

_WORKSHOP = Workshop(Settings(), cache_folder())


def _finish(state: SearchState) -> None:
    folder = RunFolder.create(RUNS / f"studio-{uuid.uuid4().hex[:8]}", _WORKSHOP.settings)
    conclude_run(folder, _WORKSHOP, state, folder.record, _SEARCH.proposer.account)


_SEARCH = Search(_WORKSHOP.proposer, _WORKSHOP.search_settings(), lambda event: None, _finish)
search = _SEARCH.graph().compile()
