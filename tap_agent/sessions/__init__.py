"""What a person starts: a search, a conversation, a proxy applied to a network."""
