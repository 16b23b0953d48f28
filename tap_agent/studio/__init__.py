"""Runs in LangGraph Studio: the server of `tap-agent studio`, and the graphs that langgraph.json names."""
