"""How heads are fitted."""
