"""The recipes, one readable file each; `ftkit recipes` lists them."""
