"""What records decodes and trains filters on them."""
