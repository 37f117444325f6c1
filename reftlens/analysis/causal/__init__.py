"""What an exchange of hidden states shows: scores with controls, maps, illusions."""
