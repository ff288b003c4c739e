"""Views of a decode: annotated text, a terminal, a page, a demo."""
