"""Models: loading them, and what the loop must know about them."""
