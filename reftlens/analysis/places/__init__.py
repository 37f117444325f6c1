"""Where an edit does its work: positions, sites, cells, paths, several edits together."""
