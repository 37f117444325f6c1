"""What a learned subspace is: directions, geometry, and what reads and writes it."""
