"""ALFWorld: household tasks in text, on the TextWorld engine."""
