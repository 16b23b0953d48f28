"""A network made ready: its products found, norms folded, outputs compared, its steps recorded."""
