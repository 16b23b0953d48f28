"""A quantized network as files that other software reads."""
