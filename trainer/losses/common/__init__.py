"""What objectives are made of. A package, so no word that a recipe could name."""
