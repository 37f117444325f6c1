"""One HTML file about an intervention: what it edits, what it does, how strongly, where, and what speaks against it."""
