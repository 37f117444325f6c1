"""What an edit can change, and how that alone is computed."""
