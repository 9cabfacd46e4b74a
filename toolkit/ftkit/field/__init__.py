"""After shipping: what devices have collected comes home."""
