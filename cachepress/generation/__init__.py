"""Generation: from a text to a compressed cache, and from that to answers."""
