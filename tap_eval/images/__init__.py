"""Where images come from, how they are cut and normalized, and the three splits."""
