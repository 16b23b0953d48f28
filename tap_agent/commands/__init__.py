"""The commands of `tap-agent`, a file each or a few of a kind."""
