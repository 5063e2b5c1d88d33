"""Rules of lowtide's own for answers: texts to avoid or to mention, lengths, paths of a graph, plans, choices."""
