"""Small Flax modules and the functions under them: norms, feed-forward, initial values."""
