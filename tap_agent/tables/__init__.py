"""Tables of many runs: plans that say what is measured, the lines that come of it, and figures cited from papers."""
