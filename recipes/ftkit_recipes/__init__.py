"""One readable file a recipe; `ftkit recipes` lists them."""
