"""A network with its images: the ledger, accuracy, layer errors, racing, other machines."""
