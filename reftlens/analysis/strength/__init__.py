"""How strongly an edit should act: effect, divergence, size and fluency over its strength."""
