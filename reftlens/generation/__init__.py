"""Text written under an edit."""
