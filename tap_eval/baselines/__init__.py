"""What a proxy is compared with."""
