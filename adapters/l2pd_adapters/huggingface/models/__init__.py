"""Models: loading them, and the facts about them that the loop needs."""
