"""Runs in the terminal: what commands print, the live table, the conversation, and what works on this machine."""
