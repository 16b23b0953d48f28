"""What the page and the server behind Studio share: the address that they listen on, and whose requests they take."""
