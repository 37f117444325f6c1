"""The experiments that ReFT was judged by: rows of data sets, answers read in texts, scores."""
