"""Tools around decoding: evaluation, training of filters, viewing, and the command line."""
