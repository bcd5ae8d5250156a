"""From a recipe and a model to a plan: what each stage will do, to which weights, at which cost, and what is wrong with it."""
