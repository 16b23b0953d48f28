"""What a run is made of: declared, read and checked."""
