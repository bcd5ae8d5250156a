"""One run, from a recipe, a model and data to a report."""
