"""Forward passes of a decode."""
